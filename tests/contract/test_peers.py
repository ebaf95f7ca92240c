"""Peers: the chunked run equals decoding token by token with the real cache, and stated bytes equal its storages."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, QuantizedCache

from kvcompress.errors import OptionError
from kvcompress.evaluate.peer_caches import AXIS, GROUP, KiviLayer, PeerCache, hqq_layer, quanto_layer
from kvcompress.evaluate.peer_run import decoded_states, evaluate_peer
from kvcompress.evaluate.peers import PEERS, Peer, find_peer
from kvcompress.evaluate.perplexity import Original
from kvcompress.evaluate.windows import Windows
from kvcompress.model.architectures import read_model_spec
from tests.tiny_models import random_ids

needs_hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed (extra `peers`)")
needs_quanto = pytest.mark.skipif(
    find_spec("optimum") is None or find_spec("optimum.quanto") is None,
    reason="optimum-quanto is not installed (extra `peers`)",
)
MARKS = {"hqq": needs_hqq, "quanto": needs_quanto}
RESIDUAL, N_TOKENS = 32, 150


def every_peer(
    *,
    only: tuple[str, ...] = ("hqq", "quanto", "kivi", "fp8", "fp8-unscaled", "turboquant", "per-token-head"),
    once: tuple[bool, ...] = (False, True),
) -> Any:
    return pytest.mark.parametrize(
        "peer",
        [
            pytest.param(
                find_peer(p.name, residual=RESIDUAL if p.keeps_window else None),
                marks=MARKS.get(p.family, ()),
                id=p.name,
            )
            for p in PEERS.values()
            if p.family in only and p.once in once
        ],
    )


def one_by_one(model: Any, ids: torch.Tensor, cache: Any, n_first: int) -> torch.Tensor:
    """Return the hidden states of generation: a prompt of n_first tokens, then every token by itself."""
    states = []
    bounds = [0, *range(n_first, ids.shape[1] + 1)]
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            output = model.get_decoder()(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            states.append(output.last_hidden_state)
    return torch.cat(states, 1)


@every_peer(only=("hqq", "quanto"), once=(False,))
def test_chunks_equal_generation_with_transformers_own_cache(tiny_model: Any, peer: Peer) -> None:
    model, ids = tiny_model("llama-mha"), random_ids(1, N_TOKENS, seed=3)
    own = QuantizedCache(
        peer.family,
        model.config,
        nbits=peer.bits,
        axis_key=AXIS[peer.family],
        axis_value=AXIS[peer.family],
        q_group_size=GROUP[peer.family],
        residual_length=RESIDUAL,
    )
    if peer.family == "quanto":
        unpack_in_torch(own)
    expected = one_by_one(model, ids, own, RESIDUAL)
    ours = decoded_states(model, ids, peer, peer.new_cache(3, torch.float32))
    exact = model.get_decoder()(input_ids=ids).last_hidden_state
    assert (ours - expected).abs().max() < 1e-3 * (exact - expected).abs().max()
    assert (exact[:, :RESIDUAL] - ours[:, :RESIDUAL]).abs().max() < 1e-4


def unpack_in_torch(cache: Any) -> None:
    """quanto compiles C++ to unpack, on its first use; the test of its layer below says that both unpack the same."""
    for layer in cache.layers:
        layer._dequantize = quanto_layer(4, RESIDUAL)._dequantize


@every_peer(only=("hqq", "quanto"), once=(True,))
def test_quantised_once_every_token_is_a_prompts(peer: Peer) -> None:
    """Each block of the window is what transformers' layer makes of it as a prompt, however long the text goes on."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 4, 5 * RESIDUAL, 8, generator=generator) for _ in range(2))
    cache = peer.new_cache(1, torch.float32)
    for chunk in peer.chunks(5 * RESIDUAL):
        seen = cache.update(keys[:, :, chunk], values[:, :, chunk], 0)
    for start in range(0, 4 * RESIDUAL, RESIDUAL):
        block = slice(start, start + RESIDUAL)
        fresh = {"hqq": hqq_layer, "quanto": quanto_layer}[peer.family](peer.bits, RESIDUAL)
        fresh.update(keys[:, :, block], values[:, :, block])
        assert torch.equal(seen[0][:, :, block], fresh._dequantize(fresh._quantized_keys))
        assert torch.equal(seen[1][:, :, block], fresh._dequantize(fresh._quantized_values))
    assert torch.equal(seen[0][:, :, 4 * RESIDUAL :], keys[:, :, 4 * RESIDUAL :])


@every_peer(only=("kivi", "fp8-unscaled", "turboquant", "per-token-head"))
def test_chunks_equal_generation_with_our_own_layers(tiny_model: Any, peer: Peer) -> None:
    model, ids = tiny_model("llama-mha"), random_ids(1, N_TOKENS, seed=3)
    expected = one_by_one(model, ids, peer.new_cache(3, torch.float32), 1)
    ours = decoded_states(model, ids, peer, peer.new_cache(3, torch.float32))
    exact = model.get_decoder()(input_ids=ids).last_hidden_state
    assert (ours - expected).abs().max() < 1e-3 * (exact - expected).abs().max()


@every_peer()
@pytest.mark.parametrize("n_tokens", [N_TOKENS, 2 * RESIDUAL, 5 * RESIDUAL])
def test_stated_bytes_are_those_of_the_storages(tiny_model: Any, peer: Peer, n_tokens: int) -> None:
    model = tiny_model("llama-bf16", dtype=torch.bfloat16, num_key_value_heads=4)
    spec = read_model_spec(model.config.to_dict())
    cache = peer.new_cache(3, torch.bfloat16)
    decoded_states(model, random_ids(1, n_tokens), peer, cache)
    assert cache.get_seq_length() == n_tokens
    assert cache.nbytes() == peer.cache_bytes(spec, n_tokens)
    assert peer.measured_bytes_per_token(spec) == peer.bytes_per_token(spec)
    original = spec.cache_bytes_per_token
    assert peer.bytes_per_token(spec) < original
    exact = peer.n_exact(n_tokens)
    assert cache.nbytes() - exact * original == pytest.approx((n_tokens - exact) * peer.bytes_per_token(spec), rel=0.02)


def test_bytes_a_token_are_those_of_the_papers(tiny_model: Any) -> None:
    spec = read_model_spec(tiny_model("llama-bf16", dtype=torch.bfloat16).config.to_dict())
    shares = {
        name: p.bytes_per_token(spec) / spec.cache_bytes_per_token for name, p in PEERS.items() if p.family != "fp4"
    }
    assert shares["hqq-4bit"] == shares["quanto-4bit"] == (4 + 32 / 64) / 16
    assert shares["hqq-2bit"] == shares["quanto-2bit"] == (2 + 32 / 64) / 16
    assert (shares["kivi-4bit"], shares["kivi-2bit"]) == ((4 + 32 / 32) / 16, (2 + 32 / 32) / 16)
    assert shares["fp8"] == shares["fp8-unscaled"] == 0.5


@needs_quanto
@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_is_unpacked_as_quanto_does(bits: int) -> None:
    from optimum.quanto.library.unpack import unpack  # its own torch version

    states = torch.randn(1, 3, 50, 32, generator=torch.Generator().manual_seed(0))
    layer = quanto_layer(bits, RESIDUAL)
    stored = layer._quantize(states, axis=0)
    codes = unpack(stored._data._data, bits) if callable(unpack) else torch.ops.quanto.unpack(stored._data._data, bits)
    expected = (stored._scale * codes[: stored._data.shape[0]] - stored._shift).reshape(states.shape)
    assert torch.equal(layer._dequantize(stored), expected)
    step = (states.amax() - states.amin()) / (2**bits - 1)
    assert (expected - states).abs().max() <= step / 2 + 1e-6


def test_fp8_equals_transformers_own_layer() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    generator = torch.Generator().manual_seed(0)
    keys, values = (3 * torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    theirs = cache_utils.Fp8QuantizedLayer()
    theirs.update(keys[:, :, :30], values[:, :, :30])  # the prompt sets the scale
    ours = PEERS["fp8"].new_cache(1, torch.float32)
    ours.update(keys[:, :, :30], values[:, :, :30], 0)
    for ours_part, their_part in zip(
        ours.update(keys[:, :, 30:], values[:, :, 30:], 0),
        theirs.update(keys[:, :, 30:], values[:, :, 30:]),
        strict=True,
    ):
        assert torch.equal(ours_part, their_part)


def test_kivi_rounds_to_the_nearest_of_its_levels() -> None:
    """Against a quantiser written out in float64: keys in groups of 32 tokens, values in groups of 32 channels."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 64, 32, generator=generator) for _ in range(2))
    layer = KiviLayer(2, 0)
    layer.update(keys, values)
    seen_keys, seen_values = layer.update(keys[:, :, :1], values[:, :, :1])
    for x, seen, groups in ((keys, seen_keys, (2, 32)), (values, seen_values, (3, 32))):
        grouped = x.double().unflatten(groups[0], (-1, 32))
        dim = groups[0] + 1
        low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
        step = (high - low) / 3
        expected = (low + step * ((grouped - low) / step).round()).flatten(groups[0], groups[0] + 1)
        # scales and minima are stored in float16, which moves a level by 2^-11 and a few numbers to another level
        near = (seen[:, :, :64].double() - expected).abs() < 0.01
        assert near.double().mean() > 0.995
    assert torch.equal(seen_keys[:, :, 64:], keys[:, :, :1])


@every_peer()
def test_what_is_stored_depends_on_the_stored_dtype_alone(tiny_model: Any, peer: Peer) -> None:
    """A bf16 checkpoint run in float32 keeps bf16 in the peer's cache."""
    cache = peer.new_cache(1, torch.bfloat16)
    x = torch.randn(1, 4, 64, 8, generator=torch.Generator().manual_seed(0))
    keys, _ = cache.update(x, x, 0)
    assert keys.dtype == torch.float32
    keys, _ = cache.update(x, x, 0)
    assert torch.equal(keys, keys.to(torch.bfloat16).float())


@needs_hqq
def test_evaluation(tiny_checkpoint: Any, tiny_model: Any, text_file: Path) -> None:
    model = tiny_model("llama-gqa")
    spec = read_model_spec(model.config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama-gqa"))
    original = Original(model, Windows.of(tokenizer, str(text_file), 128, 2), remember=True)
    ratios, kl = {}, {}
    for name in ("hqq-4bit", "hqq-2bit"):
        peer = find_peer(name, residual=RESIDUAL)
        result = evaluate_peer(model, original, peer, spec)
        ratios[name], kl[name] = result.perplexity["ratio"], result.kl_nats
        assert result.protocol["recent"] == RESIDUAL and result.protocol["windows"] == 2
        assert result.protocol["cache"]["bytes_at_seq_len"] == peer.cache_bytes(spec, 128)
        assert result.keep == pytest.approx((peer.bits + 2 * 32 / 64) / 32)  # the checkpoint is float32
    assert 0 < kl["hqq-4bit"] < kl["hqq-2bit"]


@every_peer(only=("hqq", "quanto", "kivi", "fp8", "fp8-unscaled"))
def test_windows_can_be_decoded_together(tiny_checkpoint: Any, tiny_model: Any, text_file: Path, peer: Peer) -> None:
    model = tiny_model("llama-mha")
    spec = read_model_spec(model.config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama-mha"))
    original = Original(model, Windows.of(tokenizer, str(text_file), 128, 3))
    done: list[int] = []
    single = evaluate_peer(model, original, peer, spec)
    several = evaluate_peer(model, original, peer, spec, batch=2, progress=lambda n, _: done.append(n))
    assert done == ([1, 2, 3] if peer.family == "fp8" else [2, 3])
    # hqq stops its search by the mean error of the batch
    assert several.kl_nats == pytest.approx(single.kl_nats, rel=0.1 if peer.family == "hqq" else 1e-3)
    assert several.protocol["cache"]["bytes_at_seq_len"] == single.protocol["cache"]["bytes_at_seq_len"]


def test_what_does_not_fit_is_refused(tiny_model: Any) -> None:
    spec = read_model_spec(tiny_model("llama-gqa").config.to_dict())
    with pytest.raises(OptionError, match=r"unknown\. Choose from hqq-4bit"):
        find_peer("int4")
    with pytest.raises(OptionError, match="fp8 keeps no token exactly"):
        find_peer("fp8", residual=64)
    with pytest.raises(OptionError, match="do not divide"):
        find_peer("hqq-4bit", residual=3).check(spec, 128)
    with pytest.raises(OptionError, match="groups of 32 channels, and a token of this model has 16 in a layer"):
        find_peer("kivi-2bit").check(spec, 512)
    with pytest.raises(OptionError, match="hardly leave"):
        find_peer("hqq-4bit").check(spec, 128)
    sliding = read_model_spec(tiny_model("mistral-sliding").config.to_dict())
    with pytest.raises(OptionError, match="full attention only"):
        find_peer("fp8").check(sliding, 128)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompress.evaluate.peer_caches.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"kvcompress\[peers\]"):
        hqq_layer(4, 128)
    with pytest.raises(OptionError, match=r"optimum.quanto"):
        PEERS["quanto-2bit"].new_cache(1, torch.float32)


def test_storages_are_counted_once() -> None:
    cache = PeerCache([KiviLayer(4, 128)], torch.float32)
    x = torch.zeros(1, 1, 8, 32)
    cache.update(x, x, 0)
    cache.layers[0].again = cache.layers[0].keys[:, :, :2]
    assert cache.nbytes() == 2 * x.numel() * 4
