"""Which codecs a layer of the engine has: the plan's, or of a plan cut for tensor parallelism the rank's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import layer_codecs
from kvcompress.errors import CheckpointError, OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.model_spec import PARTS, Part, Site
from kvcompress.model.rope import Rotary
from kvcompress.plan import Plan
from kvcompress.site_plan import SitePlan


def layer_plans(plan: Plan, layer: int) -> dict[Part, SitePlan] | None:
    """Return the plans of a layer's keys and values, None for a layer that the plan does not know."""
    found = {s.part: s for s in plan.sites if s.layer == layer}
    return found or None


def heads_of(maps: SiteMaps, first: int, stop: int, head_dim: int, *, site: Site) -> SiteMaps:
    """Return the maps of KV heads first..stop-1 alone. Raises OptionError where a block mixes them with other heads."""
    inside = (maps.blocks >= first * head_dim) & (maps.blocks < stop * head_dim)
    kept = inside.all(1)
    if bool((inside.any(1) & ~kept).any()):
        n_heads = maps.blocks.numel() // head_dim
        raise OptionError(
            f"{site} of the plan mixes KV heads across ranks of the tensor parallel group: each rank holds "
            f"{stop - first} of {n_heads} heads, and a block of the maps has {maps.blocks.shape[1] // head_dim or 1}. "
            f"Use fewer ranks, or compress again with --group {stop - first} or a divisor of it."
        )
    number = torch.full((len(maps.blocks),), -1, dtype=torch.long)
    number[kept] = torch.arange(int(kept.sum()))
    block = number[maps.block.long()]
    mine = block >= 0
    width = slice(first * head_dim, stop * head_dim)
    return replace(
        maps,
        blocks=maps.blocks[kept] - first * head_dim,
        block=block[mine],
        encoder=maps.encoder[mine],
        decoder=maps.decoder[mine],
        bits=maps.bits[mine],
        step=maps.step[mine],
        mean=None if maps.mean is None else maps.mean[width],
    )


def rank_site(site: SitePlan, maps: SiteMaps | None, width: int) -> SitePlan:
    """Return the plan of what a rank keeps of a site: of its maps, or `width` exact numbers."""
    if maps is None:
        return replace(site, width=width, bits=tuple((b, width) for b, _ in site.bits[:1]))
    counts = Counter(maps.bits.tolist())
    return replace(site, width=maps.blocks.numel(), bits=tuple(sorted(counts.items(), reverse=True)))


def rank_heads(n_heads: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """Return which KV heads a rank holds, [first, stop): its share, or one that several ranks hold alike."""
    if n_ranks <= n_heads:
        share = n_heads // n_ranks
        return rank * share, (rank + 1) * share
    head = rank * n_heads // n_ranks
    return head, head + 1


@lru_cache(maxsize=8)
def on_device(rotary: Rotary, device: torch.device) -> Rotary:
    """Return RoPE whose frequencies lie on a device, where a CUDA graph can read them; one for all layers."""
    frequencies = rotary.inv_freq.to(device)
    return Rotary(frequencies, rotary.scale, start=rotary.start, interleaved=rotary.interleaved)


def make_layer_codecs(
    plans: dict[Part, SitePlan],
    maps: dict[Part, SiteMaps | None],
    *,
    rotary: Rotary | None,
    n_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> LayerKernels:
    """Return a layer's codecs on the device; rotary: None in a layer without RoPE. maps: None for an exact part."""
    for part in PARTS:
        if plans[part].width != n_kv_heads * head_dim:
            raise CheckpointError(
                f"the maps of {plans[part].site} are for {plans[part].width} numbers a token, the model's layer has "
                f"{n_kv_heads} heads of {head_dim}. Attach them to the model that they were made for."
            )
    key, value = layer_codecs(maps["key"], maps["value"], device, turn=plans["key"].turn)
    rotated_mean: Tensor | None = None
    if rotary is not None:
        rotary = None if key is None else on_device(rotary, device)
    if key is not None and plans["key"].rotated and rotary is not None:
        rotated_mean, key.mean = key.mean, None  # it turns with the position, which a codec does not know
    return LayerKernels(
        key,
        value,
        rotary,
        n_kv_heads,
        head_dim,
        cached_rotated=plans["key"].rotated,
        rotated_mean=rotated_mean,
        turn=plans["key"].turn,
    )
