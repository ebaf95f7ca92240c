"""The search for the smallest cache whose measured loss stays below a bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.calibration.builtin import BUNDLED
from kvcompress.calibration.mixture import held_out_windows, window_shares
from kvcompress.calibration.text import CODE, PROSE, SELF
from kvcompress.evaluate import max_ratio
from kvcompress.evaluate.max_ratio import MOST_STEPS, Search, Step, next_keep
from kvcompress.options import CompressOptions
from tests.tiny_models import build_tokenizer


def walk(curve, max_ratio: float) -> list[tuple[float, float]]:
    steps: list[tuple[float, float]] = []
    while (keep := next_keep(steps, max_ratio)) is not None:
        steps.append((keep, curve(keep)))
    return steps


@given(
    at=st.floats(0.02, 0.9),
    slope=st.floats(-5, -2),
    bend=st.floats(-0.5, 0.5),
    bound=st.sampled_from([1.001, 1.005, 1.05]),
)
def test_finds_the_least_keep_of_a_curve(at: float, slope: float, bend: float, bound: float) -> None:
    """log(ratio - 1) falls with log(keep), bent either way: within 6% of where the curve crosses, in few steps."""

    def curve(keep: float) -> float:
        x = math.log(keep / at)
        return 1 + (bound - 1) * math.exp(slope * x - bend * x * abs(x))

    steps = walk(curve, bound)
    found = min(keep for keep, ratio in steps if ratio <= bound)
    assert at * 0.999 <= found <= at * 1.1 or len(steps) == MOST_STEPS
    assert found <= at * 1.6 and len(steps) <= MOST_STEPS


def test_few_steps_on_what_was_measured() -> None:
    """The default on SmolLM2, window 64 (docs/measurements.md), a straight line between its points."""
    points = [(0.0625, 0.0706), (0.125, 0.0145), (0.25, 0.0006), (1.0, 1e-6)]

    def curve(keep: float) -> float:
        below = max((p for p in points if p[0] <= keep), default=points[0])
        above = min((p for p in points if p[0] > keep), default=points[-1])
        share = math.log(keep / below[0]) / math.log(above[0] / below[0]) if above != below else 0.0
        return 1 + below[1] * (above[1] / below[1]) ** share

    steps = walk(curve, 1.005)
    assert len(steps) <= 5 and all(keep == round(keep, 4) for keep, _ in steps)
    assert 0.157 < min(k for k, r in steps if r <= 1.005) < 0.175


def test_nothing_is_enough() -> None:
    """Where even the whole cache loses too much, the search ends with it."""
    steps = walk(lambda keep: 1.5, 1.005)
    assert steps[-1][0] == 1 and len(steps) <= MOST_STEPS


def test_everything_is_enough() -> None:
    assert walk(lambda keep: 1.0, 1.005)[-1][0] == 0.016


def test_noise_below_one_does_not_lead_astray() -> None:
    """Ratios a little below 1 are enough; between them and a loss the bound is still found."""
    steps = walk(lambda keep: 0.9995 if keep > 0.2 else 1.02, 1.005)
    assert min(k for k, r in steps if r <= 1.005) == pytest.approx(0.2, rel=0.07)


def test_the_document_says_what_was_enough() -> None:
    steps = (Step(0.125, {"a": 1.02, "b": 1.001}), Step(0.2, {"a": 1.004, "b": 1.0}), Step(0.01, {}))
    document = Search(1.005, 0.2, steps, 2, 64, 1.0).to_json()
    assert [(s["worst"], s["enough"]) for s in document["steps"]] == [(1.02, False), (1.004, True), (None, False)]


def test_a_kind_is_bounded_with_its_error() -> None:
    step = Step(0.2, {"steady": 1.004, "few windows": 1.001}, {"steady": 0.0005, "few windows": 0.005})
    assert step.worst == pytest.approx(1.006)
    assert not Search(1.005, 0.2, (step,), 8, 64, 1.0).to_json()["steps"][0]["enough"]


def test_bundled_texts_are_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration may leave a single window of one of them, which says little."""
    options, tokenizer = CompressOptions(tokens=40 * 64, seq_len=64), build_tokenizer()
    monkeypatch.setattr(max_ratio, "sample_windows", lambda model, _, n, seq_len, **__: torch.zeros(n, seq_len).long())
    bench = object.__new__(max_ratio._Bench)
    bench.options, bench.model, bench.n_windows = options, None, 6
    found = bench._windows(tokenizer, [])
    assert list(found) == ["bundled texts", PROSE, CODE, SELF]
    assert [len(found[kind].ids) for kind in (PROSE, CODE, SELF)] == [6, 6, 6]
    shares = window_shares(tokenizer, (), options.tokens, options.seq_len)
    alone = [held_out_windows(tokenizer, source, shares[source], 6, 64) for source in BUNDLED]
    assert torch.equal(found["bundled texts"].ids, torch.cat(alone)) and len(torch.cat(alone)) > 6
