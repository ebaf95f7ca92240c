"""Codecs with random maps, in groups of heads and quads, as plans for the kernels have them."""

from __future__ import annotations

import torch

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec
from kvcompress.model.model_spec import Part


def random_codec(
    part: Part, groups: dict[int, list[int]], n_kv_heads: int, head_dim: int, *, tiled: bool, device: str = "cpu"
) -> SiteCodec:
    """Return a codec whose groups of heads have so many components of each number of bits; orthogonal maps.

    Codes of about normal numbers fill their range.
    """
    n_groups = len(next(iter(groups.values())))
    width = n_kv_heads * head_dim // n_groups
    each = [(b, g) for b, sizes in groups.items() for g, n in enumerate(sizes) for _ in range(n)]
    bits, block = (torch.tensor(x) for x in zip(*each, strict=True))
    rows = torch.empty(len(bits), width)
    for g in range(n_groups):
        mine = block == g
        rows[mine] = torch.linalg.qr(torch.randn(width, width))[0][: int(mine.sum())]
    step = torch.where(bits < 16, 2.0 ** (2 - bits.float()), torch.ones(()))
    maps = SiteMaps(
        torch.arange(n_kv_heads * head_dim).view(n_groups, width).int(), rows.half(), rows.half(), block.int(),
        bits.to(torch.uint8), step, torch.randn(n_kv_heads * head_dim),
    )  # fmt: skip
    return SiteCodec(maps, torch.device(device), tiled_for=part if tiled else None)
