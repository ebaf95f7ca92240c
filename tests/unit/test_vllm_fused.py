"""The kernels in the engine without the engine, in Triton's interpreter: what they attend to and encode is the
reference's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.kernels import decode, encode, paged_layer, rebuilding, site
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.rotated_ahead import rounds
from kvcompress.model.rope import Rotary
from kvcompress.vllm import reference
from kvcompress.vllm.fused import FusedLayer, FusedModel, why_not_fused, why_rebuilt
from kvcompress.vllm.pages import PageLayout
from kvcompress.vllm.reference import LayerCache
from kvcompress.vllm.steps import Step
from tests.codec_cases import random_codec

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
HEADS, KV_HEADS, HEAD_DIM, SINKS, RECENT, PAGE_BLOCKS = 4, 2, 32, 3, 64, 4
GROUPS = {8: [2, 1], 4: [6, 8], 1: [4, 8]}
LENGTHS = (230, 70)


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paged_layer, site):
        monkeypatch.setattr(module, "kernels_apply", lambda device: True)


def codecs(*, rotated: bool) -> LayerKernels:
    """Keys that are encoded after RoPE, or before it and not in turns, which no kernel decodes."""
    key, value = (
        random_codec(part, GROUPS, KV_HEADS, HEAD_DIM, tiled=False, device=DEVICE) for part in ("key", "value")
    )
    rotary = Rotary((1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)).to(DEVICE), 1.0)
    mean = None
    if rotated:
        mean, key.mean = key.mean, None
    return LayerKernels(key, value, rotary, KV_HEADS, HEAD_DIM, cached_rotated=rotated, rotated_mean=mean)


def cache_of(codecs: LayerKernels) -> LayerCache:
    rows = [
        pack(
            torch.zeros(1, KV_HEADS, 32, HEAD_DIM, device=DEVICE), torch.zeros(1, 32, dtype=torch.int32, device=DEVICE)
        )
        for pack in (codecs.pack_keys, codecs.pack_values)
    ]
    layout = PageLayout(PAGE_BLOCKS, *(row.shape[2] * row.element_size() for row in rows))
    packed = torch.zeros(8, layout.n_bytes, dtype=torch.uint8, device=DEVICE)
    exact = torch.randn(20, KV_HEADS, 32, 2 * HEAD_DIM, device=DEVICE).half()
    return LayerCache(codecs, layout, packed, exact, SINKS)


def step_of(*n_new: int) -> Step:
    """Two sequences, of LENGTHS when the step is done."""
    starts, lengths = [0, n_new[0], sum(n_new)], list(LENGTHS)
    exact = [[3, 1, 2, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0, 0, 0]]
    tables = ([[2, 1], [5, 0]], exact)
    as_int32 = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lengths, *tables))
    start, length, packed, pages = as_int32
    slots = torch.zeros(sum(n_new), dtype=torch.int64, device=DEVICE)
    return Step(sum(n_new), start, length, pages, packed, slots, RECENT, max(n_new), 8 * 32)


def fused_of(cache: LayerCache, *, most_tokens: int = 8) -> tuple[FusedModel, FusedLayer]:
    layer = FusedLayer.of(cache, n_heads=HEADS, scaling=0.2, n_tokens=256, recent=RECENT, most_queries=2)
    return FusedModel({"layer": layer}, most_tokens, 4, None), layer


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(n, h, HEAD_DIM, device=DEVICE).half() for h in heads)
    return query, key, value


def expected_of(cache: LayerCache, step: Step, query: Any, key: Any, value: Any) -> torch.Tensor:
    attended = [reference.attend(cache, r, *(x[r.new].float() for x in (query, key, value)), 0.2) for r in step.rows]
    return torch.cat(attended)


def test_keys_encoded_after_rope_are_decoded_by_a_kernel(monkeypatch: Any) -> None:
    cache = cache_of(own := codecs(rotated=True))
    assert why_not_fused(own, SINKS, torch.device("cuda"), torch.float16) is None
    assert why_rebuilt(own, HEADS, PAGE_BLOCKS, torch.device("cuda")) is None
    fused, layer = fused_of(cache)
    assert fused.recordable
    step = step_of(2, 1)
    for row in step.rows:  # what was encoded before the step
        for block in range(row.n_packed // 32):
            reference.encode_block(cache, row, block)
    query, key, value = tokens(3)
    for row in step.rows:
        for i in range(row.n_new):
            page, place = row.exact[(row.computed + i) // 32], (row.computed + i) % 32
            cache.exact[page, :, place] = torch.cat([key[row.start + i], value[row.start + i]], -1)
    out = torch.full_like(query, torch.nan)
    fused.attend(layer, query, fused.begin(step, 3), out)
    expected = expected_of(cache, step, query, key, value)
    assert (out - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("rotated", [True, False])
def test_generation_is_encoded_as_the_reference_does(rotated: bool) -> None:
    cache = cache_of(codecs(rotated=rotated))
    fused, _ = fused_of(cache)
    step = step_of(1, 1)
    fused.encode_completed(step)
    got, known = cache.packed.clone(), cache_of(cache.codecs)
    known.exact.copy_(cache.exact)
    blocks = [(i, b) for found in step.completed().tolist() for i, b in enumerate(found) if b >= 0]
    assert blocks
    for i, block in blocks:
        reference.encode_block(known, step.rows[i], block)
    # A latent on the other side of a step, by float16, is another code.
    assert (got == known.packed).float().mean() > 0.97
    assert bool(got.any()) and not got[0].any()  # the null page stays as it was


def test_keys_that_no_kernel_decodes_are_rebuilt() -> None:
    cache = cache_of(own := codecs(rotated=False))
    assert why_not_fused(own, SINKS, torch.device("cuda"), torch.float16) is None
    assert "turns" in str(why_rebuilt(own, HEADS, PAGE_BLOCKS, torch.device("cuda")))
    fused, layer = fused_of(cache)
    assert not fused.recordable
    step = step_of(1, 33)
    for row in step.rows:
        for block in range(row.n_packed // 32):
            reference.encode_block(cache, row, block)
    query, key, value = tokens(34)
    contexts = fused.contexts(step)
    assert [row.start for row, _ in contexts] == [0, 1]
    out = torch.cat([fused.attend_chunk(layer, c, query[r.new], key[r.new], value[r.new]) for r, c in contexts])
    expected = expected_of(cache, step, query, key, value)
    assert (out - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("rotated", [True, False])
def test_the_first_request_launches_nothing_that_the_warm_up_did_not(
    rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their constants, of which each set is compiled by itself. What lies in pages stays."""
    launched = set[tuple[str, str]]()

    def noted(module: Any, name: str) -> None:
        kernel = getattr(module, name)

        class Noted:
            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **constants: Any) -> None:
                    launched.add((name, str(sorted(constants.items()))))
                    kernel[grid](*args, **constants)

                return launch

        monkeypatch.setattr(module, name, Noted())

    for name in ("centre_kernel", "gain_kernel", "pack_kernel"):
        noted(encode, name)
    for name in ("latents_kernel", "heads_kernel"):
        noted(rebuilding, name)
    if rotated:
        for name in ("prepare_kernel", "score_kernel", "value_kernel", "output_kernel"):
            noted(decode, name)
    cache = cache_of(codecs(rotated=rotated))
    fused, layer = fused_of(cache, most_tokens=2)
    launched.clear()  # what cache_of did
    cache.packed.fill_(77)
    assert fused.warm_up(64) == 1  # keys and values have the same levels, and plain rows
    assert bool((cache.packed[1:] == 77).all()) and not bool((cache.packed[0] == 77).all())
    warmed = set(launched)
    launched.clear()
    step = step_of(100, 33)
    _, key, value = tokens(133)
    for row, context in fused.contexts(step):
        reference.encode_chunk(layer.cache, row, key[row.new], value[row.new])
        fused.attend_chunk(layer, context, tokens(133)[0][row.new], key[row.new], value[row.new])
    fused.encode_completed(step_of(1, 1))
    if rotated:
        query = tokens(2)[0]
        fused.attend(layer, query, fused.begin(step_of(1, 1), 2), torch.empty_like(query))
    assert {name for name, _ in launched} == {name for name, _ in warmed} and len(launched) > 5
    assert launched <= warmed, sorted(launched - warmed)


def test_no_variant_is_compiled_twice() -> None:
    """Two at once would not know of each other."""
    needed = [frozenset(x) for x in ("ab", "ac", "db", "dc", "ab", "ef", "af", "gh")]
    made = set("ab")
    for at_once in rounds(needed, made=frozenset(made)):
        new = [x for i in at_once for x in needed[i] - made]
        assert new and len(new) == len(set(new))
        made |= set(new)
    assert made == set("abcdefgh")
    assert rounds(needed, made=frozenset(made)) == []


class NoHostRead(TorchDispatchMode):
    """Fails where a number of a tensor is read: on a GPU that waits for all that was launched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        return func(*args, **(kwargs or {}))


def test_a_chunk_of_a_prompt_waits_for_nothing() -> None:
    cache = cache_of(codecs(rotated=False))
    fused, layer = fused_of(cache)
    step = step_of(100, 33)  # the first goes on in the middle of a block
    _, key, value = tokens(133)
    contexts = fused.contexts(step)
    with NoHostRead():
        for row, _ in contexts:
            reference.encode_chunk(layer.cache, row, key[row.new], value[row.new])
    with pytest.raises(AssertionError, match="a number was read"), NoHostRead():
        int(step.lengths[0])


def test_a_layer_that_is_kept_whole_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_layer, "kernels_apply", lambda device: False)  # it has no codec that tells its device
    whole = LayerKernels(None, None, None, KV_HEADS, HEAD_DIM, cached_rotated=False, rotated_mean=None)
    assert why_not_fused(whole, SINKS, torch.device("cpu"), torch.float16) == "a part of it is kept whole"
