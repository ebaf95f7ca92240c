"""A cache of a fixed capacity: what the growing one gives, at addresses that never change, step by recorded step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvcompress
import kvcompress.runtime.graph as graph_module
from kvcompress.errors import OptionError
from kvcompress.kernels import turned
from kvcompress.options import CompressOptions
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.graph import GraphDecoder
from kvcompress.runtime.static import StaticCache
from tests import emulator
from tests.tiny_models import PAD, random_ids, save_tiny_checkpoint

N_STEPS = 2 * BLOCK_TOKENS + 1  # two evictions, or three


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    """attached(family, **options): a model with a plan of make_plan."""

    def make(family: str = "llama-gqa", **options: Any) -> Any:
        options = {"keep": 0.5, "sinks": 2, "recent": 5, "policy": "uniform"} | options
        return attach_plan(tiny_model(family), *tiny_plan(family, **options))

    return make


def growing(model: Any, ids: Tensor, n_prompt: int) -> Tensor:
    """Return logits [batch, 1 + n_steps, vocabulary] after a prompt and after each further token."""
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        logits = [model(ids[:, :n_prompt], past_key_values=cache).logits[:, -1]]
        logits += [model(token, past_key_values=cache).logits[:, -1] for token in ids[:, n_prompt:].split(1, 1)]
    return torch.stack(logits, 1)


def static(decoder: GraphDecoder, ids: Tensor, n_prompt: int) -> Tensor:
    logits = [decoder.prefill(ids[:, :n_prompt])]
    logits += [decoder.step(token) for token in ids[:, n_prompt:].unbind(1)]
    return torch.stack(logits, 1)


def tensors(cache: StaticCache) -> list[Tensor]:
    """Every tensor that the cache, its layers and its counters reach."""
    counters = cache.tokens.counters
    of_layers = [t for layer in cache.layers for t in layer._tensors().values()]
    return [*of_layers, *(getattr(counters, name) for name in counters.__slots__)]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-gqa", {}),
    ("llama-gqa", {"ranks_only": True}),
    ("llama-gqa", {"key_basis": "frequency"}),
    ("llama-yarn", {"key_basis": "frequency", "ranks_only": True}),
    ("qwen3", {"turn": 64}),
    ("llama-mha", {"turn": 32, "key_basis": "per_head", "value_basis": "per_head", "ranks_only": True}),
    ("llama-mqa", {"sinks": 0, "recent": 0}),
    ("qwen2", {}),
    ("mistral", {"ranks_only": True}),
    ("phi3-partial", {"turn": 64}),
    ("llama-gqa", {"sinks": 40, "recent": 3}),
    ("smollm3", {"sinks": 4, "recent": 70}),
    ("llama-gqa", {"policy": "middle", "layers": "1:2", "keep": 0.8, "ranks_only": True}),  # two layers stay whole
    ("llama-gqa", {"policy": "loss", "keep": 0.7, "ranks_only": True}),  # some parts of layers do
]


#: Prompts of one token and of a hundred in turn; the first two cases with both.
PROMPTS = [(*case, (1, 100)[i % 2]) for i, case in enumerate(CASES)] + [(*CASES[0], 100), (*CASES[1], 1)]


@pytest.mark.parametrize(("family", "options", "n_prompt"), PROMPTS)
def test_gives_what_the_growing_cache_gives(attached: Any, family: str, options: dict[str, Any], n_prompt: int) -> None:
    model, ids = attached(family, **options), random_ids(2, n_prompt + options.get("recent", 0) + N_STEPS)
    decoder = GraphDecoder(model, capacity=ids.shape[1])
    torch.testing.assert_close(static(decoder, ids, n_prompt), growing(model, ids, n_prompt), rtol=1e-4, atol=1e-4)
    assert decoder.cache.get_seq_length() == ids.shape[1]
    assert max(layer.n_encoded for layer in decoder.cache.layers) > n_prompt  # tokens that came alone were packed
    assert not decoder.recorded


def test_a_second_prompt_finds_nothing_of_the_first(attached: Any) -> None:
    model, first, second = attached(), random_ids(2, 150), random_ids(2, 120, seed=1)
    decoder = GraphDecoder(model, capacity=150)
    static(decoder, first, 90)
    torch.testing.assert_close(static(decoder, second, 10), growing(model, second, 10), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not hasattr(torch.cuda._utils, "_nvrtc_compile"),  # torch 2.9
    reason="with torch 2.6 and transformers 5.0 tracing makes a mask, which a cache of a fixed capacity refuses",
)
def test_a_compiled_model_gives_the_same(attached: Any) -> None:
    model, ids = attached(turn=64), random_ids(2, 45)  # the eviction is one of the compiled steps
    expected = growing(model, ids, 34)
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, backend="eager"), attachment_of(model).new_cache(capacity=45)
    with torch.no_grad():
        logits = [model(ids[:, :34], past_key_values=cache).logits[:, -1]]
        logits += [compiled(token, past_key_values=cache).logits[:, -1] for token in ids[:, 34:].split(1, 1)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"policy": "middle", "layers": "1:2", "keep": 0.8, "ranks_only": True}])
def test_addresses_and_bytes_stay(attached: Any, options: dict[str, Any]) -> None:
    decoder, ids = GraphDecoder(attached(**options), capacity=150), random_ids(2, 150)
    decoder.prefill(ids[:, :20])
    buffers, n_bytes = tensors(decoder.cache), decoder.cache.nbytes()
    places = [t.data_ptr() for t in buffers]
    for token in ids[:, 20:].unbind(1):
        decoder.step(token)
    decoder.prefill(ids[:, :40])
    assert all(a is b for a, b in zip(tensors(decoder.cache), buffers, strict=True))
    assert [t.data_ptr() for t in buffers] == places
    assert n_bytes == decoder.cache.nbytes() == sum(t.untyped_storage().nbytes() for t in buffers)


@pytest.mark.parametrize("n_prompt", [3, 90])
def test_bytes_are_those_of_the_full_cache(attached: Any, n_prompt: int) -> None:
    """Packed blocks of the plan's bytes a token, one block of room in the window, and counters instead of positions."""
    model, capacity = attached(sinks=2, recent=5), 5 + 4 * BLOCK_TOKENS
    decoder = GraphDecoder(model, capacity=capacity)
    decoder.prefill(random_ids(3, n_prompt))
    plan = attachment_of(model).plan
    block_of_room = BLOCK_TOKENS * sum(s.width for s in plan.sites) * 4
    one = plan.cache_bytes(capacity, exact_number_bytes=4) - 4 * capacity + block_of_room
    assert decoder.cache.nbytes() == 3 * one + decoder.cache.tokens.nbytes()
    assert decoder.cache.tokens.nbytes() < 1000


def test_capacity_ends_before_anything_is_lost(attached: Any) -> None:
    model, ids = attached(), random_ids(2, 80)
    decoder = GraphDecoder(model, capacity=69)  # 5 + 2 * 32: full when a block would leave
    static(decoder, ids[:, :69], 30)
    before = [t.clone() for t in tensors(decoder.cache)]
    for attempt in (
        lambda: decoder.step(ids[:, 69]),
        lambda: model(ids[:, 69:70], past_key_values=decoder.cache),
        lambda: decoder.prefill(ids[:, :70]),
    ):
        with pytest.raises(OptionError, match="room for 69 tokens of a sequence, and 70"):
            attempt()
    assert decoder.cache.get_seq_length() == 69
    assert all(torch.equal(a, b) for a, b in zip(tensors(decoder.cache), before, strict=True))
    with pytest.raises(OptionError, match="room for 69"):
        GraphDecoder(model, capacity=69).prefill(ids)
    with pytest.raises(OptionError, match="20 tokens and 51 new ones do not fit a cache of 69"):
        decoder.generate(ids[:, :20], max_new_tokens=51)
    decoder.generate(ids[:, :20], max_new_tokens=50)


def test_refuses_what_it_cannot_do(attached: Any) -> None:
    model, ids = attached(), random_ids(2, 50)
    with pytest.raises(OptionError, match="capacity is 0"):
        attachment_of(model).new_cache(capacity=0)
    with pytest.raises(OptionError, match="call prefill first"):
        GraphDecoder(model, capacity=9).step(ids[:, 0])
    decoder = GraphDecoder(model, capacity=90)
    decoder.prefill(ids)
    decoder.step(ids[:, 0])
    with pytest.raises(OptionError, match="2 sequences, and here are 1 tokens"):
        decoder.step(ids[:1, 0])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = attachment_of(model).new_cache(capacity=100)
    padded = {"attention_mask": mask, "past_key_values": cache, "pad_token_id": PAD}
    with pytest.raises(OptionError, match="no padding"):
        model.generate(ids.masked_fill(mask == 0, PAD), max_new_tokens=2, **padded)
    with pytest.raises(OptionError, match="no padding"):
        model(ids, past_key_values=cache, attention_mask=mask.flip(1))
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=cache)
    with pytest.raises(OptionError, match="one token at a time and no mask; here are 2 tokens"):
        model(ids[:, :2], past_key_values=cache)
    with pytest.raises(OptionError, match="1 tokens and a mask"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.cat([mask, mask[:, -1:]], 1))
    with pytest.raises(OptionError, match="allocated for 2 sequences, and here are 1"):
        model(ids[:1, :1], past_key_values=cache)
    for change in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        with pytest.raises(OptionError, match="of a fixed capacity"):
            change()
    assert cache.get_seq_length() == 50


def test_refuses_a_sliding_window(attached: Any) -> None:
    attachment = attachment_of(attached("mistral-sliding"))
    with pytest.raises(OptionError, match="sliding window of 12"):
        attachment.new_cache(capacity=12)
    attachment.new_cache(capacity=11)


def test_refuses_a_folded_checkpoint(folded_output: Any) -> None:
    model = kvcompress.load(folded_output("llama-mha", {"key_basis": "head", "value_basis": "head"}))
    with pytest.raises(OptionError, match="folded"):
        attachment_of(model).new_cache(capacity=50)


def test_generates_what_the_model_generates(attached: Any) -> None:
    model, ids = attached(), random_ids(2, 30)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=90, do_sample=False, pad_token_id=PAD)
    assert torch.equal(GraphDecoder(model, capacity=119).generate(ids, max_new_tokens=90), expected)
    cache = attachment_of(model).new_cache(capacity=119)
    by_model = model.generate(ids, max_new_tokens=90, do_sample=False, pad_token_id=PAD, past_key_values=cache)
    assert torch.equal(by_model, expected)


@pytest.mark.parametrize("places", [(3, 12), (70, 33), (0, 0)])
def test_generation_ends_at_end_tokens(attached: Any, places: tuple[int, int]) -> None:
    """The greedy tokens at these places become end tokens."""
    model, ids = attached(), random_ids(2, 30)
    model.generation_config.eos_token_id = None
    free = model.generate(ids, max_new_tokens=90, do_sample=False, pad_token_id=PAD)
    ends = [int(free[row, 30 + place]) for row, place in enumerate(places)]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, PAD
    expected = model.generate(ids, max_new_tokens=90, do_sample=False)
    assert torch.equal(GraphDecoder(model, capacity=119).generate(ids, max_new_tokens=90), expected)


class NothingForTheHost(TorchDispatchMode):
    """Raises where an operation would wait for the device, or bring numbers of the host to it: no graph has those."""

    REFUSED = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.REFUSED, f"a recorded step calls {func}"
        return func(*args, **(kwargs or {}))


class Recording:
    """Stands in for graph.record on a CPU: a replay runs the step with the host's numbers as they were at recording.

    As a CUDA graph does, it leaves the host alone, and writes its result to one place. The first step is a warm-up.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.n_replays = 0
        monkeypatch.setattr(graph_module, "record", self.record)
        monkeypatch.setattr(GraphDecoder, "_recordable", lambda decoder: decoder._n_steps > 0)

    def record(self, step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        decoder = step.__self__  # type: ignore[attr-defined]
        tokens, frozen = decoder.cache.tokens, (decoder.cache.tokens.n_tokens, decoder.cache.tokens.n_packed)
        result = torch.empty(len(decoder._token), decoder.model.config.vocab_size, dtype=decoder.model.dtype)

        def replay() -> None:
            host = tokens.n_tokens, tokens.n_packed
            tokens.n_tokens, tokens.n_packed = frozen
            with NothingForTheHost():
                result.copy_(step())
            tokens.n_tokens, tokens.n_packed = host
            self.n_replays += 1

        tokens.count()
        return replay, result


def assert_replays_follow(
    model: Any, ids: Tensor, n_prompt: int, replayed: set[int], switch: str, monkeypatch: Any
) -> tuple[Recording, GraphDecoder]:
    """Read ids over a cache of a fixed capacity: at `replayed` steps run in kernels, and are as the reference has them
    over the same cache and over one that grew.

    Between them the model reads with the reference, which is faster here. switch: the name of what turns kernels on.
    """
    reference = growing(model, ids, n_prompt).float()
    kernels_on = False
    monkeypatch.setattr(switch, lambda device: kernels_on)
    recording, decoder = Recording(monkeypatch), GraphDecoder(model, capacity=300)
    decoder.prefill(ids[:, :n_prompt])

    def read(place: int, cache: StaticCache) -> Tensor:
        with torch.no_grad():
            return model(ids[:, place : place + 1], past_key_values=cache).logits[:, -1].float()

    for place in range(n_prompt, ids.shape[1]):
        if place not in replayed:
            read(place, decoder.cache)
            continue
        same, grown = read(place, copy.deepcopy(decoder.cache)), reference[:, place - n_prompt + 1]
        kernels_on = True
        ours = decoder.step(ids[:, place]).float()
        kernels_on = False
        assert (ours - same).norm() / same.norm() < 0.01  # both round to float16 after every layer
        # What earlier steps rounded otherwise has moved codes across borders: then even the reference is off by 0.014.
        assert (ours - grown).norm() / grown.norm() < 0.03
    return recording, decoder


@pytest.mark.skipif(not emulator.available(), reason="needs g++ 12, for the emulator")
@pytest.mark.parametrize(
    "options",
    [
        {"key_basis": "per_head", "value_basis": "per_head", "keep": 0.3},
        {"group": 2, "keep": 0.5, "ranks_only": True},
    ],
)
def test_one_recorded_step_serves_them_all(tmp_path: Path, options: dict[str, Any], monkeypatch: Any) -> None:
    """Through the emulated kernels for turns, at a few of many steps: nothing encoded yet, evictions, a new turn."""
    source = save_tiny_checkpoint(tmp_path / "source", "llama-bf16", head_dim=64, num_hidden_layers=2)
    chosen = CompressOptions(metric="weights", turn=128, sinks=2, recent=5, **options)
    kvcompress.compress(source, tmp_path / "out", chosen)
    model = kvcompress.load(tmp_path / "out", dtype=torch.float16)
    n_prompt, replayed = 10, {12, 36, 37, 38, 69, 70, 140, 165, 166}
    ids = random_ids(2, 170)
    monkeypatch.setattr(turned, "_kernels", emulator.kernels)
    recording, decoder = assert_replays_follow(
        model, ids, n_prompt, replayed, "kvcompress.kernels.layer.compiler_works", monkeypatch
    )
    assert recording.n_replays == len(replayed) - 1 and decoder.recorded
    assert decoder.cache.layers[0].n_encoded == 160
