"""Encoding on the GPU: tokens that leave the window, and prompts, from numbers to packed words.

The projection is one matrix product of the library's. What comes before it (un-rotating, the mean) is one Triton
launch; what follows it (gain, rounding, packing) is two, which read the latents once each and write only the words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.tiles import Tiles
from kvcompress.errors import OptionError
from kvcompress.kernels.layout import BLOCK_TOKENS, LEVELS, PackedSite
from kvcompress.kernels.packing import centre_kernel, error_kernel, gain_kernel, pack_kernel
from kvcompress.model.rope import Rotary

_WIDTH = 64
_CENTRED_TOKENS = 16
#: Tokens of a program that searches gains: few where there are at most so many, so that all multiprocessors have some.
_GAIN_TOKENS, FEW_TOKENS = 8, 4096


def centred(x: Tensor, mean: Tensor | None, rotary: Rotary | None, positions: Tensor | None) -> Tensor:
    """Return heads [batch, heads, n_tokens, head_dim] un-rotated and without the mean: float16 [batch, n_tokens, n].

    rotary: of whole heads, None for values and keys without RoPE; positions: [1 or batch, n_tokens].
    """
    batch, n_heads, n_tokens, head_dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(batch, n_tokens, n_heads * head_dim, dtype=torch.float16, device=x.device)
    rotated = rotary is not None and positions is not None
    where, frequencies, scale, stride = out, out, 1.0, 0
    if rotary is not None and positions is not None:
        where, frequencies, scale = positions.contiguous(), rotary.inv_freq.to(x.device), rotary.scale
        stride = n_tokens if len(where) > 1 else 0
    centre_kernel[(-(-n_tokens // _CENTRED_TOKENS), n_heads, batch)](
        x, out, where, frequencies, out if mean is None else mean, out, *x.stride()[:3], stride, n_tokens, scale,
        HEAD_DIM=head_dim, WIDTH=1 << (head_dim // 2 - 1).bit_length(), TOKENS=_CENTRED_TOKENS, ROTATED=rotated,
        HAS_MEAN=mean is not None, PAGED=False,
    )  # fmt: skip
    return out


def centred_pages(
    x: Tensor, sources: Tensor, mean: Tensor | None, rotary: Rotary | None, positions: Tensor | None
) -> Tensor:
    """Return blocks of 32 tokens that lie in pages as `centred` does it: float16 [1, n_blocks * 32, n].

    x: [pages, 32, heads, head_dim]; sources: int32 [n_blocks], the page of each block, or -1 for zeros;
    positions: [1, n_blocks * 32].
    """
    _, _, n_heads, head_dim = x.shape
    n_tokens = len(sources) * BLOCK_TOKENS
    out = torch.empty(1, n_tokens, n_heads * head_dim, dtype=torch.float16, device=x.device)
    where, frequencies, scale, rotated = out, out, 1.0, False
    if rotary is not None and positions is not None:
        where, frequencies, scale, rotated = positions, rotary.inv_freq.to(x.device), rotary.scale, True
    centre_kernel[(n_tokens // _CENTRED_TOKENS, n_heads, 1)](
        x, sources, where, frequencies, out if mean is None else mean, out, x.stride(0), x.stride(2), x.stride(1), 0,
        n_tokens, scale, HEAD_DIM=head_dim, WIDTH=1 << (head_dim // 2 - 1).bit_length(), TOKENS=_CENTRED_TOKENS,
        ROTATED=rotated, HAS_MEAN=mean is not None, PAGED=True,
    )  # fmt: skip
    return out


def project(x: Tensor, encoder: Tensor) -> Tensor:
    """Return latents x E^T [..., R] in encoder's dtype; x: [..., n]; encoder: [R, n], steps folded in.

    In float16 the error is 2^-11 of the largest codes, 1/8 of a step at most: less than what rounding adds.
    """
    if x.dtype != encoder.dtype:
        limit = torch.finfo(encoder.dtype).max
        x = x.clamp(-limit, limit).to(encoder.dtype)
    return x @ encoder.T


def pack_latents(
    latents: Tensor,
    site: PackedSite,
    *,
    first_block: int = 0,
    tiles: Tiles | None = None,
    destinations: Tensor | None = None,
    gains: Tensor | None = None,
) -> None:
    """Write the codes of latents [batch, n_blocks * 32, R], in units of the steps, into site.words from first_block on.

    tiles: those of a site whose rows have the tile layout. With site.has_gain each token gets the gain with which it is
    rebuilt best. destinations: int32 [n_blocks], where site.words are pages [pages, blocks of a page, n_words]: of each
    block of the one batch entry its row, counted through all pages, or -1 for none. gains: uint8 [batch, n_blocks *
    32], codes of gains that are chosen already. Raises OptionError if the tokens do not fill whole blocks or do not
    fit.
    """
    batch, n_tokens, n_components = latents.shape
    n_blocks = n_tokens // BLOCK_TOKENS
    room = site.words.shape[1] - first_block if destinations is None else len(destinations)
    if n_tokens % BLOCK_TOKENS or n_components != site.n_components or n_blocks > room:
        raise OptionError(
            f"latents {tuple(latents.shape)} do not fit packed words {tuple(site.words.shape)} from block "
            f"{first_block}. Expected whole blocks of {BLOCK_TOKENS} tokens and {site.n_components} components."
        )
    latents = latents.contiguous()
    words = site.words[:, first_block:]
    counts = site.class_counts
    if gains is None:
        gains = torch.empty(batch * n_tokens if site.has_gain else 0, dtype=torch.uint8, device=latents.device)
        if site.has_gain:
            _try_gains(gain_kernel, latents, site, gains)
    chunks = sum(-(-count // _WIDTH) for count in counts)
    if n_blocks and chunks:
        pack_kernel[(n_blocks, chunks, batch)](
            latents, gains, words, words if tiles is None else tiles.quads,
            words if destinations is None else destinations, latents.stride(0), latents.stride(1),
            words.stride(0), words.stride(1), site.gain_word, n_blocks, *counts,
            CLASSES=sum(bits for bits in LEVELS if site.counts.get(bits, 0)), WIDTH=_WIDTH, HAS_GAIN=site.has_gain,
            TILES="" if tiles is None else tiles.part, PAGE_BLOCKS=0 if destinations is None else words.shape[1],
        )  # fmt: skip


def gain_errors(latents: Tensor, site: PackedSite) -> Tensor:
    """Return each token's error under each gain, float32 [batch, n_tokens, 16], as SiteCodec.gain_errors does.

    latents: [batch, n_tokens, R], n_tokens a multiple of 32.
    """
    errors = torch.zeros(*latents.shape[:2], 16, device=latents.device)
    if site.has_gain:
        _try_gains(error_kernel, latents.contiguous(), site, errors)
    return errors


def _try_gains(kernel: Any, latents: Tensor, site: PackedSite, out: Tensor) -> None:
    n_tokens, n_components = latents.shape[0] * latents.shape[1], site.n_components
    tokens = 2 if n_tokens <= FEW_TOKENS else _GAIN_TOKENS
    if n_tokens:
        kernel[(n_tokens // tokens,)](
            latents, _halves(tuple(sorted(site.counts.items())), latents.device), out, n_components,
            site.class_counts[0], n_components, WIDTH=32, TOKENS=tokens,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _halves(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return 2^(bits - 1) of every component."""
    by_bits = dict(counts)
    return torch.tensor([2.0 ** (bits - 1) for bits in LEVELS for _ in range(by_bits.get(bits, 0))], device=device)
