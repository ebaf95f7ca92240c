"""`generate` by recorded steps says what `generate` says, and is recorded only where that is so.

On a CPU nothing can be recorded: a stand-in for the graph runs the step anew at every replay. What a graph adds is
tested in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.compat import cache_argument
from kvcompress.errors import Note
from kvcompress.runtime import recording
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.recording import RecordedCache
from kvcompress.runtime.static import StaticLine
from tests.tiny_models import PAD, random_ids

LONG = {"max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": PAD}


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    def make(family: str = "llama-gqa", **options: Any) -> Any:
        options = {"keep": 0.3, "sinks": 2, "recent": 5} | options
        return attach_plan(tiny_model(family), *tiny_plan(family, **options))

    return make


class Recorder:
    """Lets steps be recorded on a CPU, and remembers the caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches: list[RecordedCache] = []
        self.allowed = False
        self._new = recording.recorded_cache
        monkeypatch.setattr("kvcompress.runtime.attach.recorded_cache", self.new)
        monkeypatch.setattr(recording, "recordable", lambda device: self.allowed)
        monkeypatch.setattr(recording, "record", self.record)
        # The reference reads the host's numbers, which a graph must not; the stand-in has them right.
        ignored = property(lambda line: False, lambda line, value: None)
        monkeypatch.setattr(StaticLine, "ran_reference", ignored, raising=False)

    def new(self, *args: Any) -> RecordedCache | None:
        cache = self._new(*args)
        if cache is not None:
            self.caches.append(cache)
        return cache

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        tokens, kept = self.caches[-1].tokens, {}

        def replay() -> None:
            tokens.n_tokens -= 1  # the step counts it again
            for name, value in step().items():
                if isinstance(value, Tensor):
                    kept[name].copy_(value)  # replays write to one place

        n_tokens, lengths = tokens.n_tokens, tokens.counters.length.clone()
        output = step()
        kept |= output  # a run whose results do not count, but for their places
        tokens.n_tokens = n_tokens + 1
        tokens.counters.length.copy_(lengths)
        return replay, output


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def both(recorder: Recorder, generate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a generation gives over the growing cache, and by recorded steps."""
    results = []
    for allowed in (False, True):
        recorder.allowed = allowed
        torch.manual_seed(3)
        results.append(generate())
    return results[0], results[1]


MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 1.3, "top_k": 20},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": False, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize(("mode", "room"), [*((mode, 256) for mode in MODES), *((mode, 4) for mode in MODES[::2])])
def test_says_the_same(
    attached: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], room: int
) -> None:
    """With little room the cache gets more of it several times over, and is recorded anew."""
    monkeypatch.setattr(recording, "_LEAST_ROOM", room)
    model, ids = attached(), random_ids(2, 50)
    growing, recorded = both(recorder, lambda: model.generate(ids, **LONG, **mode))
    assert torch.equal(growing, recorded)
    (cache,) = recorder.caches
    assert cache.get_seq_length() == 99 and cache.n_replays > 30
    assert (cache.tokens.capacity == 100) == (room == 256)
    assert max(layer.n_encoded for layer in cache.layers) == 64


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-gqa", {"policy": "middle", "layers": "1:2", "keep": 0.8, "ranks_only": True}),  # two layers stay whole
    ("qwen3", {"turn": 64}),
    ("llama-yarn", {"key_basis": "frequency"}),
    ("smollm3", {"sinks": 40}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_of_every_kind_of_layer(
    attached: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(recording, "_LEAST_ROOM", 8)
    model, ids = attached(family, **options), random_ids(1, 50)
    growing, recorded = both(recorder, lambda: model.generate(ids, do_sample=False, **LONG))
    assert torch.equal(growing, recorded) and recorder.caches[0].n_replays > 30


def test_ends_where_generation_ends(attached: Any, recorder: Recorder) -> None:
    model, ids = attached(), random_ids(2, 50)
    free = model.generate(ids, do_sample=False, **LONG)
    options = {"eos_token_id": int(free[0, 70]), "max_new_tokens": 50, "pad_token_id": PAD, "do_sample": False}
    growing, recorded = both(recorder, lambda: model.generate(ids, **options))
    assert torch.equal(growing, recorded) and recorder.caches


def test_what_cannot_be_recorded_runs_as_before(attached: Any, recorder: Recorder) -> None:
    model, ids = attached(), random_ids(2, 50)
    padded = ids.clone()
    padded[0, :7] = PAD
    greedy = {"do_sample": False, **LONG, "max_new_tokens": 20, "min_new_tokens": 20}
    calls: list[Callable[[], Any]] = [
        lambda: model.generate(padded, attention_mask=(padded != PAD).long(), **greedy),
        lambda: model.generate(padded, **greedy),  # transformers makes a mask of the padding
        lambda: model.generate(ids, num_beams=2, **greedy),
        lambda: model.generate(ids[:1], prompt_lookup_num_tokens=4, **greedy),
        lambda: model.generate(ids, return_dict_in_generate=True, **greedy).sequences,
        lambda: model.generate(ids, use_cache=False, **greedy),
        lambda: model.generate(ids, **greedy, **cache_argument(model, attachment_of(model).new_cache())),
        lambda: model.generate(ids, **greedy | {"max_new_tokens": 3, "min_new_tokens": 3}),
        lambda: model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy),
    ]
    for call in calls:
        growing, recorded = both(recorder, call)
        assert torch.equal(growing, recorded)
    assert not recorder.caches


def test_a_sliding_window_is_not_recorded(attached: Any, recorder: Recorder) -> None:
    model, ids = attached("mistral-sliding"), random_ids(1, 50)
    growing, recorded = both(recorder, lambda: model.generate(ids, do_sample=False, **LONG))
    assert torch.equal(growing, recorded) and not recorder.caches


def test_a_model_that_cannot_be_captured_says_so_and_goes_on(
    attached: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that waits for the device in its forward, say."""

    def fails(step: Any, device: Any) -> Any:
        step()  # as far as it came, it has counted
        recorder.caches[-1].tokens.counters.length.sub_(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "record", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    model, ids = attached(), random_ids(2, 50)
    with pytest.warns(Note, match="steps are not recorded: operation not permitted") as notes:
        growing, recorded = both(recorder, lambda: model.generate(ids, do_sample=False, **LONG))
    assert torch.equal(growing, recorded) and len(notes) == 1
    assert recorder.caches[0].n_replays == 0
