"""Trainable maps: the run time's codec at first, with gradients that are those of what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.quantise import best_gain, dequantise, gain, quantise
from kvcompress.heal.site import TrainableSite, chosen_gain

HEAD_DIM = 4


def site_maps(bits: list[int], *, n_blocks: int = 1, width: int = 8, seed: int = 0, folded: bool = False) -> SiteMaps:
    """Return random maps whose components have these bits, spread over the blocks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = len(bits)
    numbers = torch.randperm(n_blocks * width, generator=generator) if n_blocks > 1 else torch.arange(width)
    return SiteMaps(
        blocks=numbers.reshape(n_blocks, width).int(),
        encoder=random(rank, width),
        decoder=random(rank, width),
        block=(torch.arange(rank) % n_blocks).int(),
        bits=torch.tensor(bits, dtype=torch.uint8),
        step=torch.where(torch.tensor(bits) < 16, random(rank).abs() + 0.2, 1.0),
        mean=None if folded else random(n_blocks * width),
    )


def sample(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("bits", [[8, 4, 4, 2, 1], [16, 16, 4, 2, 1], [16] * 6, [32] * 6, []])
def test_before_training_it_is_the_codec_to_the_last_bit(bits: list[int], n_blocks: int) -> None:
    maps = site_maps(bits, n_blocks=n_blocks)
    x = sample(2, 40, n_blocks * 8)
    site = TrainableSite(maps, head_dim=HEAD_DIM)
    expected = SiteCodec(maps, torch.device("cpu")).roundtrip(x) if bits else torch.zeros_like(x)
    torch.testing.assert_close(site(x), expected, rtol=0, atol=1e-6)
    same = site.trained_maps()
    for name in ("encoder", "decoder", "step", "mean"):
        assert torch.equal(getattr(same, name), getattr(maps, name)), name


def test_gains_are_chosen_as_at_run_time() -> None:
    z = sample(3000, 12) * torch.logspace(-2, 2, 3000).unsqueeze(1)
    half = torch.tensor([128.0] * 3 + [8.0] * 3 + [2.0] * 3 + [1.0] * 3)
    chosen, best = chosen_gain(z, half), best_gain(z, half)
    assert len(best.unique()) == 16
    assert float((chosen == best).float().mean()) > 0.999  # where two are as good, rounding decides


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_gradients_without_a_quantiser_are_those_of_finite_differences(n_blocks: int) -> None:
    site = TrainableSite(site_maps([32] * 6, n_blocks=n_blocks), head_dim=HEAD_DIM).double()
    x = sample(3, n_blocks * 8).double().requires_grad_(True)

    def run(x: Tensor, *changes: Tensor) -> Tensor:
        names = [n for n, _ in site.named_parameters()]
        mean = site.current_mean()
        assert mean is not None
        with torch.no_grad():
            assert names == ["mean_change", "encoder_change", "decoder_change"]
        values = dict(zip(names, changes, strict=True))
        result: Tensor = torch.func.functional_call(_Centred(site), {f"site.{n}": v for n, v in values.items()}, (x,))
        return result

    changes = [0.1 * torch.randn_like(p).detach() for p in site.parameters()]
    assert torch.autograd.gradcheck(run, (x, *(c.requires_grad_(True) for c in changes)))


class _Centred(torch.nn.Module):
    """x -> D E (x - m) + m."""

    def __init__(self, site: TrainableSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        mean = self.site.current_mean()
        assert mean is not None
        result: Tensor = self.site(x - mean) + mean
        return result


def test_gradients_of_decoder_and_mean_are_those_of_finite_differences_through_the_quantiser() -> None:
    """Codes do not depend on the decoder, nor on what is added after decoding: there the loss is smooth."""
    site = TrainableSite(site_maps([4, 4, 2, 1]), head_dim=HEAD_DIM).double()
    x = sample(16, 8).double()
    assert site.decoder_change is not None
    loss = site(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, [site.decoder_change])
    for index in [(0, 0), (2, 5), (3, 7)]:
        with torch.no_grad():
            site.decoder_change[index] += 1e-6
            above = site(x).square().sum()
            site.decoder_change[index] -= 2e-6
            below = site(x).square().sum()
            site.decoder_change[index] += 1e-6
        assert gradient[index].item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-4)


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    site = TrainableSite(site_maps([2, 2]), head_dim=HEAD_DIM)
    z = torch.tensor([[0.3, -1.2], [0.4, 900.0]], requires_grad=True)  # the largest gain reaches to 13.5 steps
    site.quantised(z).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))


def test_the_gradient_of_a_step_is_that_of_learned_step_sizes() -> None:
    """d(z^)/d(step) = code value - z/step inside the range, code value outside (arXiv 1902.08153, Eq. 3)."""
    maps = site_maps([2] * 4, width=4)
    eye = torch.eye(4)
    maps = SiteMaps(maps.blocks, eye, eye, maps.block, maps.bits, maps.step, torch.zeros(4))
    site = TrainableSite(maps, head_dim=HEAD_DIM)
    x = 3 * sample(50, 4)
    site(x).sum().backward()
    u = x / maps.step
    g = gain(best_gain(u, torch.full((4,), 2.0))).unsqueeze(-1)
    value = dequantise(quantise(u / g, 2.0), 2.0)
    slope = (value - torch.where((u / g).abs() <= 2, u / g, 0.0)) * g
    assert site.step_change is not None and site.step_change.grad is not None
    torch.testing.assert_close(site.step_change.grad, (slope * maps.step).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "n_parameters"), [("free", 8 * 8), ("channels", 2 * 8), ("complex", 4 * 8), ("fixed", 0)]
)
def test_decoders_of_folded_sites_stay_what_they_are(shape: Any, n_parameters: int) -> None:
    maps = site_maps([32] * 8, width=8, folded=True)
    site = TrainableSite(maps, head_dim=HEAD_DIM, shape=shape)
    assert sum(p.numel() for p in site.parameters()) == n_parameters
    if site.decoder_change is None:
        assert torch.equal(site.current_decoder(), maps.decoder)
        return
    torch.nn.init.normal_(site.decoder_change)
    size = maps.decoder.square().mean(1, keepdim=True).sqrt()  # the unit of rows that are not quantised
    change = (site.current_decoder() - maps.decoder) / size
    heads = change.unflatten(0, (2, HEAD_DIM))
    if shape == "channels":
        torch.testing.assert_close(heads, heads[:, :1].expand(-1, HEAD_DIM, -1), rtol=1e-4, atol=1e-4)
    if shape == "complex":
        (re, im), (minus_im, same_re) = (half.chunk(2, -1) for half in heads.chunk(2, 1))
        torch.testing.assert_close(re, same_re, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(im, -minus_im, rtol=1e-4, atol=1e-4)


def test_rows_too_large_for_half_precision_move_their_scale() -> None:
    maps = site_maps([4, 4])
    large = SiteMaps(
        maps.blocks, (maps.encoder * 2e4).half(), (maps.decoder / 2e4).half(), maps.block, maps.bits,
        maps.step * 2e4, maps.mean,
    )  # fmt: skip
    site = TrainableSite(large, head_dim=HEAD_DIM)
    assert site.encoder_change is not None
    with torch.no_grad():
        site.encoder_change += 2.0
    trained = site.trained_maps()
    assert trained.encoder.dtype == torch.float16 and bool(trained.encoder.isfinite().all())
    x = sample(30, 8)
    seen = SiteCodec(trained, torch.device("cpu")).roundtrip(x)
    error = (seen - site(x)).square().sum() / site(x).square().sum()
    assert error < 0.01
