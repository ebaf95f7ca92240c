"""Turns: moments of keys that are un-rotated by the position of the first token of an aligned group of tokens.

Within a turn of T tokens a key keeps the rotation by its distance d = 0..T-1 from the first. With R_d the rotation by
d positions, and all distances alike, the moments of such keys follow from those of un-rotated ones:

    m' = E_d[R_d] m    C' = E_d[R_d (C + m m^T) R_d^T] - m' m'^T    F' = E_d[R_d F R_d^T]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.calibration.moments import Moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Site
from kvcompress.side_by_side import side_by_side


def turned_moments(
    spec: ModelSpec, moments: Moments, turns: Mapping[Site, int], *, seed: int, device: str = "cpu"
) -> Moments:
    """Return the moments with those of keys turned; layers without RoPE, and values, stay as they are.

    turns: of each layer's keys the tokens of a turn; 1 where every key is un-rotated by its own position. device:
    where they are turned; moments are on the CPU.
    """

    def turned(site: Site) -> SiteMoments:
        generator = torch.Generator().manual_seed(seed + site.layer)
        inv_freq = torch.tensor(spec.rotations[site].frequencies)
        sums = moments.sites[site].to(device)
        return turned_site(sums, spec.attention(site), inv_freq, turns[site], generator=generator).to("cpu")

    chosen = [site for site in spec.rotations if turns.get(site, 1) > 1]
    found = side_by_side(turned, chosen, width=max(map(spec.width, chosen), default=1), device=device)
    return replace(moments, sites=moments.sites | dict(zip(chosen, found, strict=True)))


def turned_site(
    sums: SiteMoments, attention: AttentionSpec, inv_freq: Tensor, turn: int, *, generator: torch.Generator
) -> SiteMoments:
    """Return the moments of a layer's keys in turns of `turn` tokens; each sample is rotated by a random distance.

    sums: on any device, where the result is, too. inv_freq: [rotary_dim / 2]. generator: on the CPU. Every stored block
    must hold both channels of each pair that RoPE rotates.
    """
    device = sums.total.device
    frequencies = torch.zeros(attention.head_dim, dtype=torch.float64)  # channels that RoPE leaves alone: 0
    frequencies[torch.tensor(attention.pairs())] = inv_freq.double()[:, None]

    def cos_sin(distance: Tensor) -> tuple[Tensor, Tensor]:
        angles = (distance[:, None] * frequencies).to(device)
        return angles.cos(), angles.sin()  # [n_distances, head_dim]

    cos, sin = cos_sin(torch.arange(turn))
    averages = cos.T @ cos / turn, cos.T @ sin / turn, sin.T @ sin / turn
    partner, sign = (t.to(device) for t in _quarter_turn(attention))
    channel = torch.arange(attention.width, device=device) % attention.head_dim
    mean_cos, mean_sin = cos.mean(0)[channel], sin.mean(0)[channel]

    def rotated(samples: Tensor) -> Tensor:
        sample_cos, sample_sin = cos_sin(torch.randint(turn, (len(samples),), generator=generator))
        return (sample_cos[:, channel] * samples + sample_sin[:, channel] * sign * samples[:, partner]).float()

    def averaged(stored: list[Tensor]) -> list[Tensor]:
        return [
            torch.stack([_averaged(s, b, averages, partner, sign) for s, b in zip(moment, blocks, strict=True)])
            for moment, blocks in zip(stored, sums.partitions, strict=True)
        ]

    return replace(
        sums,
        total=mean_cos * sums.total + mean_sin * sign * sums.total[partner],
        outer=averaged(sums.outer),
        fisher=averaged(sums.fisher),
        samples=rotated(sums.samples),
        typical=None if sums.typical is None else rotated(sums.typical),
    )


def _averaged(
    second: Tensor, block: Tensor, averages: tuple[Tensor, Tensor, Tensor], partner: Tensor, sign: Tensor
) -> Tensor:
    """Return E_d[R_d S R_d^T] of one block's S [width, width], with R_d = diag(cos) + diag(sin) J multiplied out.

    block: [width], numbers of the site; averages: E_d[cos cos^T], E_d[cos sin^T] and E_d[sin sin^T] over channels of
    a head; partner, sign: J, as _quarter_turn returns it.
    """
    head_dim = averages[0].shape[0]
    channel = block % head_dim
    cos_cos, cos_sin, sin_sin = (a[channel[:, None], channel] for a in averages)
    place = torch.empty_like(partner)
    place[block] = torch.arange(len(block), device=block.device)
    other, signs = place[partner[block]], sign[block]
    left = signs[:, None] * second[other]  # J S
    right = second[:, other] * signs  # S J^T
    both = left[:, other] * signs  # J S J^T
    return cos_cos * second + cos_sin * right + cos_sin.T * left + sin_sin * both


def _quarter_turn(attention: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Return (partner, sign), [n] each, so that J x = sign * x[partner] is a rotation by 90 degrees.

    Numbers that RoPE leaves alone are their own partners; their sine is 0.
    """
    other, sign = torch.arange(attention.head_dim), torch.ones(attention.head_dim, dtype=torch.float64)
    first, second = torch.tensor(attention.pairs()).T
    other[first], other[second] = second, first
    sign[first] = -1
    heads = torch.arange(attention.n_kv_heads)[:, None] * attention.head_dim
    return (heads + other).flatten(), sign.repeat(attention.n_kv_heads)
