"""Decoding end to end in `bench`: caches as if a prompt had been read, at batches that fit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from kvcompress.bench import decode
from kvcompress.bench.decode import (
    STEPS,
    UNCOMPRESSED,
    WARM_UP,
    Decoder,
    FixedDecoder,
    bytes_per_sequence,
    fixed_bytes_per_sequence,
    largest_batch,
    time_decode,
)
from kvcompress.bench.random_model import (
    cache_nbytes,
    fill_compressed,
    llama_config,
    random_model,
    random_plan,
    uncompressed_cache,
)
from kvcompress.bench.workload import SHAPES, typical_counts
from kvcompress.errors import OptionError
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attach_plan, attachment_of

TINY, CPU, FLOAT = SHAPES["tiny"], torch.device("cpu"), torch.float32
COUNTS = typical_counts(TINY.width, 0.25)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(TINY, CPU, FLOAT)


@pytest.fixture
def attached():
    torch.manual_seed(0)
    plan, maps = random_plan(TINY, COUNTS, COUNTS, FLOAT)
    return attach_plan(random_model(TINY, CPU, FLOAT), plan, maps)


def filled(model, context, batch):
    return fill_compressed(attachment_of(model).new_cache(), context, batch, device=CPU, dtype=FLOAT)


@pytest.mark.parametrize("context", [64, 96, 130])
@torch.no_grad()
def test_the_compressed_cache_takes_what_the_plan_says_while_tokens_leave_the_window(attached, context):
    plan, batch = attachment_of(attached).plan, 3
    cache = filled(attached, context, batch)
    decoder = Decoder(attached, cache, context, batch)
    packed = cache.layers[0].n_encoded
    for n_tokens in range(context, context + 40):
        assert cache.get_seq_length() == n_tokens
        assert cache.nbytes() == batch * plan.cache_bytes(n_tokens, exact_number_bytes=4)
        decoder.step()
        assert decoder.logits.isfinite().all()
    assert cache.layers[0].n_encoded > packed == plan.n_encoded(context)


@torch.no_grad()
def test_uncompressed_caches_give_the_same_logits(model):
    """Prefilled by a real prompt: in place or concatenated, the next tokens are those of transformers' own cache."""
    prompt = torch.randint(TINY.n_vocab, (2, 20), generator=torch.Generator().manual_seed(1))
    own = DynamicCache()
    model(input_ids=prompt, past_key_values=own)
    preallocated, dynamic = (
        uncompressed_cache(TINY, 20, 2, n_new=n_new, device=CPU, dtype=FLOAT) for n_new in (5, None)
    )
    for mine in (preallocated, dynamic):
        for layer, source in zip(mine.layers, own.layers, strict=True):
            layer.keys.copy_(source.keys)
            layer.values.copy_(source.values)
    first = cache_nbytes(preallocated)
    decoders = [Decoder(model, cache, 20, 2) for cache in (own, preallocated, dynamic)]
    for decoder in decoders:
        decoder.token = prompt[:, -1:].clone()
        for _ in range(5):
            decoder.step()
    for decoder in decoders[1:]:
        torch.testing.assert_close(decoder.logits, decoders[0].logits)
    assert cache_nbytes(preallocated) == first == cache_nbytes(dynamic) == 2 * 25 * 2 * TINY.width * 2 * 4


@torch.no_grad()
def test_a_cache_that_stays_one_length_sees_the_tokens_read_and_the_new_one(model):
    prompt = torch.randint(TINY.n_vocab, (2, 20), generator=torch.Generator().manual_seed(1))
    own = DynamicCache()
    model(input_ids=prompt, past_key_values=own)
    steady = uncompressed_cache(TINY, 21, 2, n_new=0, device=CPU, dtype=FLOAT)
    for layer, source in zip(steady.layers, own.layers, strict=True):
        layer.keys[:, :, :20].copy_(source.keys)
        layer.values[:, :, :20].copy_(source.values)
    decoders = [Decoder(model, cache, 20, 2, recordable=True) for cache in (own, steady)]
    for decoder in decoders:
        decoder.token = prompt[:, -1:].clone()
        decoder.step()
    torch.testing.assert_close(decoders[1].logits, decoders[0].logits)
    decoders[1].step()
    assert steady.layers[0].keys.shape[2] == 21
    assert cache_nbytes(steady) == 2 * 21 * 2 * TINY.width * 2 * 4


@torch.no_grad()
def test_an_attached_model_decodes_over_the_packed_tokens(attached):
    """Other packed codes of the same window give other logits: the old tokens are attended to."""
    torch.manual_seed(3)
    cache = filled(attached, 128, 1)
    logits = []
    for _ in range(2):
        decoder = Decoder(attached, cache, 128, 1)
        decoder.token = torch.zeros(1, 1, dtype=torch.long)
        decoder.step()
        logits.append(decoder.logits)
        cache.crop(-1)
        for layer in cache.layers:
            layer.packed_values = layer.packed_values.roll(1, -1)
    assert not torch.allclose(logits[0], logits[1])


@torch.no_grad()
def test_a_fixed_cache_decodes_as_the_growing_one_it_was_filled_like(attached):
    fixed, batch = FixedDecoder(attached, 130, 2), 2
    cache = attachment_of(attached).new_cache()
    cache.tokens.append(torch.arange(130)[None], batch)
    cache.layers = [layer.filled() for layer in fixed.cache.layers]
    for layer in cache.layers:
        layer.tokens = cache.tokens
        layer.batch_select_indices(torch.arange(batch))  # copies
    growing = Decoder(attached, cache, 130, batch)
    growing.token = fixed.token[:, None].clone()
    for _ in range(40):
        fixed.step()
        growing.step()
        assert torch.equal(fixed.token, growing.token[:, 0])


def test_rows_are_those_of_every_context_uncompressed_first():
    rows = timed(contexts=[64, 128], batch=2)
    assert [(r.cache, r.keep, r.context) for r in rows] == [
        (cache, keep, context)
        for context in (64, 128)
        for cache, keep in (*((name, 1.0) for name in UNCOMPRESSED), ("compressed", 0.25), ("fixed", 0.25))
    ]
    plan, _ = random_plan(TINY, COUNTS, COUNTS, FLOAT)
    for row in rows:
        plain = max(r.tokens_per_second for r in rows if r.context == row.context and r.cache in UNCOMPRESSED)
        assert row.batch == 2 and row.peak_bytes is None
        assert row.tokens_per_second == pytest.approx(2e3 / row.milliseconds)
        assert row.speedup == pytest.approx(row.tokens_per_second / plain)
        n_tokens = row.context + WARM_UP + STEPS
        whole = 2 * (row.context + 1 if row.cache == "recorded" else n_tokens) * 2 * TINY.width * TINY.n_layers * 4
        packed = 2 * plan.cache_bytes(n_tokens, exact_number_bytes=4)
        if row.cache == "fixed":
            assert 0 < row.cache_bytes - packed < 2 * (BLOCK_TOKENS + 1) * 2 * TINY.width * TINY.n_layers * 4
            assert row.cache_bytes <= 2 * fixed_bytes_per_sequence(plan, row.context, FLOAT)
            continue
        assert row.cache_bytes == (packed if row.cache == "compressed" else whole)
        assert row.cache_bytes <= 2 * bytes_per_sequence(plan, row.context, FLOAT) or row.cache != "compressed"


def test_the_largest_batch_grows_as_the_cache_shrinks(monkeypatch):
    monkeypatch.setattr(decode, "_CPU_CACHE", 2.5e6)
    rows = timed(contexts=[128], batch=None, n_steps=1)
    assert [r.batch for r in rows] == [r.computed_batch for r in rows]
    n_bytes = 4 * 2 * (128 + WARM_UP + 1) * TINY.width * TINY.n_layers
    assert rows[1].batch == rows[2].batch == 2.5e6 // n_bytes
    plan, _ = random_plan(TINY, COUNTS, COUNTS, FLOAT)
    fullest = plan.cache_bytes(159, exact_number_bytes=4)  # 64 packed tokens and a window of 95, just before eviction
    assert rows[3].batch == 2.5e6 // fullest > rows[1].batch


def test_a_batch_that_does_not_fit_is_lowered_by_tenths(monkeypatch):
    asked = []

    def make(shape, context, batch, **options):
        asked.append(batch)
        if batch > 9:
            raise torch.OutOfMemoryError
        return uncompressed_cache(shape, context, batch, **options)

    monkeypatch.setattr(decode, "uncompressed_cache", make)
    monkeypatch.setattr(decode, "fill_compressed", out_of_memory)
    monkeypatch.setattr(decode, "fill_fixed", out_of_memory)
    rows = timed(contexts=[64], batch=12, n_steps=1)
    assert asked == [12, 11, 10, 9] * 3
    assert [(r.cache, r.batch) for r in rows] == [(name, 9) for name in UNCOMPRESSED]


def test_a_forward_that_ran_out_of_memory_leaves_no_layer_behind(attached, monkeypatch):
    caches = [filled(attached, 128, 1)]
    layers = [weakref.ref(layer) for layer in caches[0].layers]
    monkeypatch.setattr("kvcompress.runtime.attention.tiled_attention", out_of_memory)
    run = decode._Run(attached, 128, 1, 1e9)
    assert run.time("compressed", 0.25, lambda batch: caches[0], 1) is None
    caches.clear()
    gc.collect()
    assert all(layer() is None for layer in layers)


def test_largest_batch_leaves_room_for_weights_and_a_workspace():
    gpu = torch.device("cuda")
    assert largest_batch(1000, 10_000, 32_000, gpu) == 21
    assert largest_batch(1000, 40_000, 32_000, gpu) == 0
    assert largest_batch(1000, 0, 1e12, CPU) == 2_000_000


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(OptionError, match=r"weights of tiny take 0\.0 GB.*--memory"):
        timed(contexts=[64], batch=1, memory_gb=1e-6)


def test_the_config_has_the_shapes_sizes():
    shape = SHAPES["llama-3-8b"]
    n = sum(p.numel() for p in random_model(shape, torch.device("meta"), torch.bfloat16).parameters())
    assert n == 8_030_261_248  # Meta-Llama-3-8B
    assert llama_config(shape).num_key_value_heads == 8


def timed(*, contexts, batch, memory_gb=1.0, n_steps=None):
    counts = {0.25: {"key": COUNTS, "value": COUNTS}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_free", lambda device: None)  # collects garbage, all of the tests' process
        if n_steps is not None:
            patch.setattr(decode, "STEPS", n_steps)
        return time_decode(
            TINY, counts, contexts=contexts, batch=batch, turn=1, memory_gb=memory_gb, device=CPU, dtype=FLOAT
        )


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError
