"""Bits: budgets kept to the byte, curves that say what is true, and a packed cache that is what was planned."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import kvcompress
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.choose.bits import BitCurve, bit_curve
from kvcompress.choose.fitting import fit_site, key_basis, value_basis
from kvcompress.codec import codec as codec_module
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.quantise import gain
from kvcompress.errors import OptionError
from kvcompress.options import BIT_BASES, GAIN_BITS, LEVELS, CompressOptions
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attach_plan, attachment_of
from tests.contract.test_runtime_cache import fill
from tests.tiny_models import PAD, random_ids

KEY_BASES = [b for b in BIT_BASES if b != "latent"] + ["latent"]
FAMILIES = ["llama-gqa", "qwen2", "qwen3", "phi3-partial", "smollm3", "llama-bf16"]


@pytest.fixture
def planned(tiny_plan: Any) -> Any:
    """planned(family, **options): (plan, maps) with bits."""
    return lambda family, **options: tiny_plan(family, **({"sinks": 2, "recent": 4, "keep": 0.25} | options))


@pytest.fixture
def curves(tiny_checkpoint: Any, tiny_moments: Any) -> Any:
    """curves(family, at_a_time, **options): {site: BitCurve}."""

    def make(family: str, at_a_time: int = 1, **options: Any) -> dict[Any, BitCurve]:
        chosen, moments = CompressOptions(**options), tiny_moments(family).sites
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            spec = checkpoint.spec
            bases = {"key": key_basis(checkpoint, chosen), "value": value_basis(checkpoint, chosen)}
        made = {}
        for site in spec.sites:
            attention = spec.attention(site)
            fitted = fit_site(bases[site.part], moments[site], attention, site.part, chosen)
            made[site] = bit_curve(site, fitted, moments[site], attention, full_bits=32, at_a_time=at_a_time)
        return made

    return make


@pytest.mark.parametrize("keep", [0.02, 0.0625, 0.125, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("policy", ["loss", "uniform", "energy"])
def test_never_above_the_budget_and_close_to_it(planned: Any, keep: float, policy: str) -> None:
    plan, _ = planned("llama-gqa", keep=keep, policy=policy)
    assert plan.keep <= keep
    if policy == "loss":
        assert plan.keep > 0.97 * keep - 0.01
    assert all(s.exact for s in plan.sites) == (keep == 1.0)


@pytest.mark.parametrize("basis", KEY_BASES)
@pytest.mark.parametrize("at_a_time", [1, 4])
def test_levels_climb_each_units_lower_hull(curves: Any, basis: str, at_a_time: int) -> None:
    for curve in curves("llama-mha", at_a_time, key_basis=basis, band=4).values():
        gains = curve.curve.energy / curve.curve.numbers
        assert (gains[1:] <= gains[:-1] + 1e-12).all() and (gains >= 0).all()
        for unit in range(len(curve.loss[0]) // at_a_time):
            mine, inside = curve.unit == unit, curve.unit_of == unit
            assert int(inside.sum()) == at_a_time
            levels = [0, *curve.level[mine].tolist()]
            assert levels == sorted(set(levels)) and levels[-1] == 32 and set(levels) <= {0, *LEVELS, 32}
            losses = [curve.loss[b][inside].sum().item() for b in levels]
            assert curve.curve.numbers[mine].tolist() == [(b - a) * at_a_time for a, b in pairwise(levels)]
            assert curve.curve.energy[mine].tolist() == pytest.approx([a - b for a, b in pairwise(losses)], abs=1e-15)
            slopes = [(a - b) / (m - n) for a, b, m, n in zip(losses, losses[1:], levels[1:], levels, strict=False)]
            for level in LEVELS:  # no level that was left out lies under the hull
                below = max(i for i, b in enumerate(levels[:-1]) if b <= level)
                chord = losses[below] - slopes[below] * (level - levels[below])
                assert curve.loss[level][inside].sum().item() >= chord - 1e-12


def test_more_bits_cost_less(curves: Any) -> None:
    for curve in curves("llama-gqa").values():
        for lower, higher in zip([0, *LEVELS], [*LEVELS, 32], strict=True):
            assert (curve.loss[higher] <= curve.loss[lower] + 1e-12).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["latent", "frequency"])
def test_the_predicted_loss_is_that_of_the_codec(
    planned: Any, tiny_moments: Any, monkeypatch: pytest.MonkeyPatch, family: str, basis: str
) -> None:
    """1/2 tr(F E[e e^T]) of the calibration's own samples through the codec; gains, left out of it, make it less."""
    with_gains = [_measured(planned(family, key_basis=basis), tiny_moments(family).weighed().sites)]
    monkeypatch.setattr(codec_module, "best_gain", lambda z, half: torch.full(z.shape[:-1], 4, dtype=torch.uint8))
    predicted, measured = _measured(planned(family, key_basis=basis), tiny_moments(family).weighed().sites)
    assert gain(torch.tensor(4)) == 1
    assert measured == pytest.approx(predicted, rel=0.25)
    assert with_gains[0][1] < measured


def _measured(made: Any, moments: Any) -> tuple[float, float]:
    """Return (predicted, measured) loss of all sites whose keys are encoded before RoPE, and values."""
    plan, maps = made
    predicted = measured = 0.0
    for site in plan.sites:
        if site.part == "key" and site.rotated:
            continue  # its samples would have to be rotated first
        sums = moments[site.site]
        x = sums.samples - sums.mean.float()
        codec = SiteCodec(maps[site.site], torch.device("cpu"))
        error = (codec.roundtrip(x) - x).double()
        fisher = sums.fisher_information(torch.arange(site.width)[None])[0]
        measured += 0.5 * float((error @ fisher * error).sum(1).mean())
        predicted += site.predicted_loss
    return predicted, measured


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", KEY_BASES)
def test_bytes_equal_the_claim(planned: Any, tiny_model: Any, family: str, basis: str) -> None:
    plan, maps = planned(family, key_basis=basis, band=4)
    model = attach_plan(tiny_model(family), plan, maps)
    for n_prompt, n_tokens in ((3, 30), (50, 75), (100, 101)):
        cache, logits = fill(model, random_ids(2, n_tokens), n_prompt)
        assert cache.nbytes() == 2 * plan.cache_bytes(n_tokens, exact_number_bytes=4)
        assert logits.isfinite().all()
    packed = [layer.packed_keys for layer in cache.layers]
    assert all(p.dtype == torch.uint8 for p in packed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", KEY_BASES)
def test_simulation_is_real_decoding(planned: Any, tiny_model: Any, family: str, basis: str) -> None:
    """The honesty test: what `eval` reports is what generation does with the packed cache."""
    model = attach_plan(tiny_model(family), *planned(family, key_basis=basis, band=4, keep=0.125))
    ids = random_ids(2, 75)
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        real = torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)
        exact = model(ids, use_cache=False).logits
        with attachment_of(model).simulated(sinks=2, recent=4, block=BLOCK_TOKENS):
            simulated = model(ids, use_cache=False).logits
    assert (simulated - exact).abs().max() > 0.05
    # A number at the edge of a cell may fall to either side: all but a few logits agree to rounding.
    assert ((simulated - real).abs() > 2e-3).float().mean() < 0.02


def test_turns_batches_and_beams_run_on_packed_codes(planned: Any, tiny_model: Any) -> None:
    model = attach_plan(tiny_model("llama-gqa"), *planned("llama-gqa"))
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": PAD}
    ids = random_ids(2, 50)
    first = model.generate(ids, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, random_ids(2, 9, seed=1)], 1)
    second = model.generate(more, past_key_values=first.past_key_values, return_dict_in_generate=True, **options)
    assert second.past_key_values.layers[0].n_encoded == 128
    beams = model.generate(ids, num_beams=3, **options)
    assert beams.shape == (2, 90)


def test_encoding_a_decoded_token_again_gives_its_codes(planned: Any, tiny_model: Any) -> None:
    """What crop relies on when it takes a block apart."""
    model = attach_plan(tiny_model("llama-gqa"), *planned("llama-gqa"))
    cache, _ = fill(model, random_ids(2, 80), 80)
    before = [layer.packed_keys.clone() for layer in cache.layers]
    cache.crop(-20)  # 60 tokens: the second block is taken apart
    assert [layer.n_encoded for layer in cache.layers] == [32] * 3
    model(random_ids(2, 80)[:, 60:68], past_key_values=cache)
    assert [layer.n_encoded for layer in cache.layers] == [64] * 3
    for layer, packed in zip(cache.layers, before, strict=True):
        ours, theirs = (layer.codecs.unpack_keys(p)[:, 32:60] for p in (layer.packed_keys, packed))
        assert ((ours - theirs).abs() < 1e-3 * (1 + theirs.abs())).float().mean() > 0.999


@pytest.mark.parametrize("part", ["key_basis", "value_basis"])
def test_bases_of_whole_heads_have_no_bits(part: str) -> None:
    with pytest.raises(OptionError, match="--ranks-only"):
        CompressOptions(**{part: "head"})


def test_data_free_bits_need_no_samples(tiny_checkpoint: Any, tmp_path: Any) -> None:
    options = CompressOptions(metric="weights", keep=0.25, recent=4)
    kvcompress.compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options)
    model = kvcompress.load(tmp_path / "out")
    assert model(random_ids(1, 60)).logits.isfinite().all()
    plan = attachment_of(model).plan
    assert any(s.quantised for s in plan.sites)
    assert all(s.bits_per_token - sum(s.component_bits) == GAIN_BITS * s.quantised for s in plan.sites)
