"""Bits of components: what each level costs and saves, as a curve that any policy can share a budget over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.choose.fitting import FittedSite
from kvcompress.codec.quantise import fit_steps
from kvcompress.model.model_spec import AttentionSpec, Site
from kvcompress.options import LEVELS
from kvcompress.policies.base import SiteCurve

#: Stand-ins for samples where there is no text: each component as a Gaussian.
_N_GAUSSIAN_SAMPLES = 4096


@dataclass(frozen=True)
class BitCurve:
    """A site's components and their levels of bits. Its items are steps of one unit up to a higher level.

    curve: losses that the items save and bits that they cost, the best first; a unit's steps come in order.
    unit, level: [n_items], whose step it is and the bits its components then have. unit_of: [R], which unit each
    component is in. step: {bits: [R]}; loss: {bits: [R]}, nats a token that a component costs at each level, 0 bits
    and full bits included.
    """

    curve: SiteCurve
    unit: Tensor
    level: Tensor
    unit_of: Tensor
    step: dict[int, Tensor]
    loss: dict[int, Tensor]
    coherence: Tensor

    def component_bits(self, n_items: int) -> Tensor:
        """Return the bits of each component [R] when the first n_items items are kept."""
        bits = torch.zeros(len(self.loss[0]), dtype=torch.long)
        return bits.scatter_reduce(0, self.unit[:n_items], self.level[:n_items], "amax")[self.unit_of]


def bit_curve(
    site: Site,
    fit: FittedSite,
    moments: SiteMoments,
    attention: AttentionSpec,
    *,
    full_bits: int,
    at_a_time: int = 1,
    in_nats: bool = True,
    device: str = "cpu",
) -> BitCurve:
    """Return the curve of a site: what b bits leave of a component, c(b), is measured on samples, not assumed.

    at_a_time: neighbouring components of a block that are one unit, and so have equal bits. in_nats: whether losses
    are the model's; others (squared errors) have no coherence. device: where samples are encoded and steps are fitted.
    A component of b bits costs c(b) of what it costs to drop it, by its own energy; dropping it costs the energy
    that is true to the whole site (see fitting.true_energy), times its coherence r, by which errors of tokens add up.
    Of the error at distortion c a part c follows the component (a quantiser's error is independent of what it
    returns), so that it costs c (c r + 1 - c).
    """
    samples = _samples(fit, moments, attention, device)
    per_item = fit.basis.numbers
    own, dropped = ((e / per_item).repeat_interleave(per_item) for e in (fit.basis.energy, fit.energy))
    coherence = _coherence(moments, len(own)) if in_nats else torch.ones_like(own)
    step, loss = {}, {0: dropped * coherence}
    for bits in LEVELS:
        step[bits], distortion = (t.cpu() for t in fit_steps(samples, bits))
        c = distortion.double()
        loss[bits] = (own * c * (c * coherence + 1 - c)).minimum(loss[0])
    loss[full_bits] = torch.zeros_like(own)
    unit_of = _units(fit.basis.components(len(fit.basis.energy)).block, at_a_time)
    unit, level, saved, cost = _hull_steps(loss, unit_of)
    order = (saved / cost).argsort(descending=True, stable=True)
    curve = SiteCurve(site, saved[order], cost[order])
    return BitCurve(curve, unit[order], level[order], unit_of, step, loss, coherence)


def _coherence(moments: SiteMoments, n_components: int) -> Tensor:
    """Return the coherence of each component of a basis, [R]: that of equal rank among those it was measured of."""
    if moments.coherence is None:
        return torch.ones(n_components, dtype=torch.float64)
    place = torch.arange(n_components) * len(moments.coherence) // max(1, n_components)
    return moments.coherence[place]


def _units(block: Tensor, size: int) -> Tensor:
    """Return the unit of each component, [R]: `size` neighbours of one block, fewer at its end; block: [R]."""
    by_block = block.argsort(stable=True)
    counts = block.bincount()
    place = torch.empty_like(block)  # among the components of the block
    place[by_block] = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block[by_block]]
    begins = place % size == 0
    unit = torch.empty(len(counts), len(block), dtype=torch.long)
    unit[block[begins], place[begins] // size] = torch.arange(int(begins.sum()))
    return unit[block, place // size]


def _hull_steps(loss: dict[int, Tensor], unit_of: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (unit, level, loss saved, bits) of the steps along each unit's lower convex hull."""
    bits, size = torch.tensor(list(loss)), unit_of.bincount()
    n_levels, n_units = len(bits), len(size)
    table = torch.zeros(n_levels, n_units, dtype=torch.float64)
    table.index_add_(1, unit_of, torch.stack(list(loss.values())))
    at, everyone = torch.zeros(n_units, dtype=torch.long), torch.arange(n_units)
    steps: list[tuple[Tensor, ...]] = []
    while bool((at < n_levels - 1).any()):
        saved = table[at, everyone] - table  # [n_levels, n_units]
        cost = (bits[:, None] - bits[at]) * size
        slope = (saved / cost.clamp_min(1)).masked_fill(cost <= 0, -math.inf)
        best = slope.argmax(0)
        moving = at < n_levels - 1
        steps.append(tuple(x[moving] for x in (everyone, bits[best], saved[best, everyone], cost[best, everyone])))
        at = torch.where(moving, best, at)
    unit, level, saved, cost = (torch.cat(x) for x in zip(*steps, strict=True))
    return unit, level, saved.clamp_min(0), cost


def _samples(fit: FittedSite, moments: SiteMoments, attention: AttentionSpec, device: str) -> Tensor:
    """Return samples of every component, scaled as its encoder scales it: [n_samples, R], float32, on a device."""
    components = fit.basis.components(len(fit.basis.energy))
    generator = torch.Generator().manual_seed(0)
    if not len(moments.samples):  # encoders scale every component to variance 1
        return torch.randn(_N_GAUSSIAN_SAMPLES, 1, generator=generator).to(device).expand(-1, len(components.block))
    turns = fit.rotated and attention.rotary_dim > 0
    x = moments.samples.to("cpu" if turns else device).double()
    if fit.centred:
        x = x - moments.mean.to(x.device)
    if turns:
        # Keys are encoded at whatever position they come to stand: any phase of each frequency is as likely.
        phase = 2 * math.pi * torch.rand(len(x), 1, attention.rotary_dim // 2, generator=generator, dtype=torch.float64)
        heads = x.unflatten(1, (attention.n_kv_heads, -1)).clone()
        first, second = torch.tensor(attention.pairs()).T
        real, imaginary = heads[..., first], heads[..., second]
        heads[..., first] = real * phase.cos() - imaginary * phase.sin()
        heads[..., second] = imaginary * phase.cos() + real * phase.sin()
        x = heads.flatten(1)
    blocks = x.to(device)[:, fit.blocks.to(device)].transpose(0, 1)  # [n_blocks, n_samples, width]
    samples, encoder = torch.empty(len(x), len(components.block), device=device), components.encoder.to(device)
    for block in range(len(blocks)):
        mine = (components.block == block).nonzero()[:, 0].to(device)
        samples[:, mine] = (blocks[block] @ encoder[mine].T).float()
    return samples
