"""Evaluations and comparisons shared out: the figures of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.compare import Request, compare
from kvcompress.evaluate.perplexity import Evaluation, evaluate
from kvcompress.evaluate.shared import evaluate_shared
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.load import load
from tests.sharing import Backwards

OPTIONS = CompressOptions(tokens=256, seq_len=64, recent=4, sinks=2, keep=0.25)


def assert_equal(ours: Evaluation, alone: Evaluation) -> None:
    """To rounding: each window is measured by itself, and sums are added in another order."""
    assert ours.log_ratios == alone.log_ratios and ours.protocol == alone.protocol
    assert ours.kl_nats == pytest.approx(alone.kl_nats, rel=1e-12)
    assert ours.perplexity == pytest.approx(alone.perplexity, rel=1e-12)
    if alone.distance is None:
        assert ours.distance is None
    else:
        assert ours.distance is not None
        assert ours.distance.component_energy == pytest.approx(alone.distance.component_energy, rel=1e-5)
        assert ours.distance.gains_at_ends == pytest.approx(alone.distance.gains_at_ends, rel=1e-6)


@pytest.mark.parametrize("form", [{}, {"maps_only": True}, {"folded": True, "key_basis": "frequency", "keep": 0.5}])
def test_windows_of_eval(tiny_checkpoint: Any, text_file: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    source = tiny_checkpoint("llama-gqa")
    from dataclasses import replace

    options = replace(OPTIONS, calibration=(str(text_file),), **form)
    compress(source, tmp_path / "out", options, device="cpu")
    how = {"seq_len": 64, "max_windows": 7}
    model = load(tmp_path / "out", base=source, dtype="float32")
    original = load_whole(source) if options.folded else None
    alone = evaluate(model, load_tokenizer(source), str(text_file), original=original, **how)
    told: list[int] = []
    workers = Backwards()
    progress = lambda done, total: told.append(done)  # noqa: E731
    shared = evaluate_shared(
        tmp_path / "out", str(text_file), workers, dtype="float32", base=str(source), **how, progress=progress
    )
    assert_equal(shared, alone)
    assert workers.called == ["_measure"] * 7 and told == list(range(1, 8))


def load_whole(source: Path) -> Any:
    from kvcompress.checkpoint.loading import load_weights

    return load_weights(source, dtype="float32")


def test_cells_of_compare(tiny_checkpoint: Any, text_file: Path, tmp_path: Path) -> None:
    """Calibrated once, by workers; then each cell by one of them; and the rows are those of one process."""
    from dataclasses import replace

    source = tiny_checkpoint("llama-mha")
    options = replace(OPTIONS, calibration=(str(text_file),), recent=8)
    request = Request(("default", "palu", "fp8"), (0.5, 0.25), str(text_file), options, seq_len=256, max_windows=2)
    alone = compare(source, tmp_path / "alone", request)
    told: list[tuple[int, int]] = []
    workers = Backwards()
    progress = lambda stage, done, total: told.append((done, total)) if stage == "compare" else None  # noqa: E731
    shared = compare(source, tmp_path / "shared", request, workers=workers, progress=progress)
    measured = ["method", "keep_asked", "ratio", "kl_nats", "bytes_per_token", "cache_bytes"]
    rows = [[{name: row[name] for name in measured} for row in found["cells"]] for found in (alone, shared)]
    assert rows[0] == rows[1] and shared["complete"]
    assert workers.summed == list(range(4))  # once
    assert workers.called.count("measure_cell") == len(rows[0])
    assert told[0] == (0, 2 * len(rows[0])) and told[-1] == (2 * len(rows[0]), 2 * len(rows[0]))
    again = Backwards()
    compare(source, tmp_path / "shared", request, workers=again)
    assert again.called == []  # finished cells are taken from the file
