"""Decoders fitted to a site's codes: nearer to tokens that the fit did not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.choose.refit import refitted
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.quantise import fit_steps

WIDTH = 16


def tokens(n: int, seed: int) -> Tensor:
    """Correlated numbers with a mean; tokens differ in size."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / 4
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(0.7 * torch.randn(n, 1, generator=generator))
    return 3 + sizes * torch.randn(n, WIDTH, generator=generator) @ mix


def moments_of(x: Tensor, n_blocks: int, *, n_samples: int = 1000) -> SiteMoments:
    sums = SiteMoments.empty([torch.arange(WIDTH).reshape(n_blocks, -1)], WIDTH)
    sums.add(x, x, n_samples=n_samples)
    return sums


def maps_of(samples: Tensor, n_blocks: int, bits: tuple[int, ...] = (16, 4, 2, 2, 1, 1)) -> SiteMaps:
    """Maps of the strongest components of each block, scaled to variance 1, that keep these bits."""
    blocks = torch.arange(WIDTH).reshape(n_blocks, -1)
    x = samples - samples.mean(0)
    rows: list[tuple[int, int, Tensor, Tensor]] = []
    for b, numbers in enumerate(blocks):
        values, vectors = torch.linalg.eigh(x[:, numbers].T @ x[:, numbers] / len(x))
        for place, level in enumerate(bits):
            vector, size = vectors[:, -1 - place], values[-1 - place].sqrt()
            rows.append((level, b, vector / size, vector * size))
    rows.sort(key=lambda row: -row[0])
    levels = torch.tensor([row[0] for row in rows], dtype=torch.uint8)
    encoder, decoder = (torch.stack([row[i] for row in rows]) for i in (2, 3))
    block = torch.tensor([row[1] for row in rows])
    step = torch.ones(len(rows))
    for i, level in enumerate(levels.tolist()):
        if level < 16:
            step[i] = fit_steps((x[:, blocks[block[i]]] @ encoder[i])[:, None], level)[0]
    return SiteMaps(blocks.int(), encoder.half(), decoder.half(), block.int(), levels, step, samples.mean(0))


def error(maps: SiteMaps, x: Tensor) -> float:
    codec = SiteCodec(maps, torch.device("cpu"))
    assert codec.mean is not None
    centred = x - codec.mean
    return float((codec.roundtrip(centred) - centred).square().mean())


@pytest.mark.usefixtures("no_batches")
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_unseen_tokens_are_rebuilt_better(n_blocks: int) -> None:
    seen, others = tokens(6000, 1), tokens(6000, 2)
    right = maps_of(seen, n_blocks)
    before = replace(right, decoder=1.3 * right.decoder)
    after = refitted(before, moments_of(seen, n_blocks))
    assert error(after, others) < error(right, others) < 0.9 * error(before, others)
    for same in ("encoder", "bits", "block"):
        assert torch.equal(getattr(after, same), getattr(before, same))
    assert after.decoder.dtype == torch.float16 and bool(after.decoder.isfinite().all())


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_last_digits_are_not_handed_on(n_blocks: int) -> None:
    """What a fit to reads would make much of: maps of steps that differ in the last digit are the same to the bit."""
    seen = tokens(6000, 1)
    maps, sums = maps_of(seen, n_blocks), moments_of(seen, n_blocks)
    nudged = replace(maps, step=torch.where(maps.bits < 16, maps.step.nextafter(torch.tensor(9.0)), maps.step))
    one, other = (vars(refitted(m, sums)) for m in (maps, nudged))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(maps.step, nudged.step)
    for numbers in (one["step"], one["mean"]):
        mantissa = torch.frexp(numbers).mantissa * 2.0**16
        assert torch.equal(mantissa, mantissa.round())


def test_what_has_no_codes_or_no_samples_stays() -> None:
    seen = tokens(200, 1)
    maps = maps_of(seen, 1)
    assert refitted(maps, moments_of(seen, 1, n_samples=0)) is maps
    numbers = replace(maps, bits=torch.full_like(maps.bits, 16), step=torch.ones(len(maps.bits)))
    assert refitted(numbers, moments_of(seen, 1)) is numbers
    assert refitted(replace(maps, mean=None), moments_of(seen, 1)).mean is None


def test_few_samples_do_no_harm() -> None:
    """They tell the errors of codes only; how numbers go together is known of all tokens."""
    seen, others = tokens(6000, 1), tokens(6000, 2)
    before = maps_of(seen, 1)
    assert refitted(before, moments_of(seen, 1, n_samples=1)) is before
    assert bool(refitted(before, moments_of(seen, 1, n_samples=2)).decoder.isfinite().all())
    assert error(refitted(before, moments_of(seen, 1, n_samples=64)), others) < 1.02 * error(before, others)


def test_steps_suit_what_gains_leave() -> None:
    """Large tokens have gains, so that steps need not reach as far as components do."""
    seen, others = tokens(6000, 1), tokens(6000, 2)
    before = maps_of(seen, 1, (4,) * 12)
    after = refitted(before, moments_of(seen, 1))
    assert float((after.step / before.step).mean()) < 0.99
    assert error(replace(before, step=after.step), others) < 0.98 * error(before, others)


def test_samples_are_believed_as_far_as_their_halves_agree() -> None:
    """The error of four bits hardly depends on the token: few samples that say it does tell of themselves."""
    seen, others = tokens(6000, 1), tokens(6000, 2)
    before = maps_of(seen, 1, (4,) * WIDTH)
    after = refitted(before, moments_of(seen, 1, n_samples=64))
    assert error(after, others) < 1.03 * error(replace(before, step=after.step), others)


def test_numbers_that_never_move_are_left_as_they_are() -> None:
    seen = tokens(600, 1)
    maps, still = maps_of(seen, 2), moments_of(torch.zeros(600, WIDTH), 2)
    after = refitted(maps, still)
    assert bool(after.decoder.isfinite().all()) and bool(after.mean is not None and after.mean.isfinite().all())
