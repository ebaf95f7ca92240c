"""Sampling at fixed addresses gives the tokens that sampling over the model's own cache gives, or is left alone.

On a CPU nothing can be recorded: a stand-in for the graph runs the step anew at every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.calibration import sampled_steps, sampling
from kvcompress.calibration.sampling import sample_windows
from tests.tiny_models import build_tokenizer


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets steps be taken at fixed addresses on a CPU; returns a list that has an entry for every replay."""
    replays: list[int] = []

    def stand_in(step: Callable[[], Tensor], _device: torch.device) -> tuple[Callable[[], None], Tensor]:
        written = torch.empty(0)

        def replay() -> None:
            result = step()
            written.resize_(result.shape).copy_(result)
            replays.append(len(result))

        return replay, written

    monkeypatch.setattr(sampled_steps, "record", stand_in)
    monkeypatch.setattr(sampled_steps, "is_recorded", lambda _device: True)  # as on a GPU
    monkeypatch.setattr(sampling, "can_be_fixed", sampled_steps.keeps_rows_whole)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return replays


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "smollm3"])
def test_the_same_tokens(tiny_model: Any, fixed: list[int], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, tokenizer = tiny_model(family), build_tokenizer()
    with monkeypatch.context() as plainly:
        plainly.setattr(sampling, "can_be_fixed", lambda *_: False)
        expected = sample_windows(model, tokenizer, 5, 16, seed=3, batch=2)
        assert not fixed
    found = sample_windows(model, tokenizer, 5, 16, seed=3, batch=2)
    assert torch.equal(found, expected)
    # two batches of two, the second of which needs no warm-up, and one of one: all but two of 15 steps
    assert len(fixed) == 13 + 15 + 13


def test_steps_that_differ_are_left_alone(tiny_model: Any, fixed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that forgets is found out at the first tokens, and the text is the model's own all the same."""
    model, tokenizer = tiny_model("llama-gqa"), build_tokenizer()
    with monkeypatch.context() as plainly:
        plainly.setattr(sampling, "can_be_fixed", lambda *_: False)
        expected = sample_windows(model, tokenizer, 2, 16, seed=3)
    monkeypatch.setattr(
        sampled_steps._FixedLayer, "update", lambda self, key, value, *_, **__: (key, value), raising=True
    )
    assert torch.equal(sample_windows(model, tokenizer, 2, 16, seed=3), expected)
    assert len(fixed) <= sampling._CHECKED


def test_layers_that_keep_less_are_not_fixed(tiny_model: Any) -> None:
    assert sampled_steps.keeps_rows_whole(tiny_model("mistral-sliding"), 12)
    assert not sampled_steps.keeps_rows_whole(tiny_model("mistral-sliding"), 13)
    assert sampled_steps.keeps_rows_whole(tiny_model("llama-gqa"), 1000)
    assert not sampled_steps.can_be_fixed(tiny_model("llama-gqa"), 16)  # on a CPU
