"""Compiling what packs tokens before there are any: a variant of the kernel for each set of levels, all at once.

Sites of a plan that shares out bits differ in their levels, so that the first tokens would wait for one compilation
after the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from kvcompress.kernels.layout import BLOCK_TOKENS, row_words
from kvcompress.kernels.site import SiteKernels

#: Threads that compile; Python's part of it they do one after the other.
_MOST = 16


def compile_packing(sites: Sequence[tuple[SiteKernels, Tensor | None]]) -> int:
    """Compile what packs into rows and into pages, side by side; return how many sets of levels there were.

    sites: each with the words of its pages, of page_views.page_words, none of which is written; None for rows alone.
    """
    of_levels: dict[tuple[object, ...], tuple[SiteKernels, Tensor | None]] = {}
    for kernels, words in sites:
        levels = frozenset(bits for bits, n in kernels.dense.counts.items() if n)
        tiles = kernels.codec.tiles
        of_levels.setdefault((levels, None if tiles is None else tiles.part, kernels.codec.has_gain), (kernels, words))
    # Triton's interpreter is one thread's at a time
    compiled = all(kernels.codec.encoder.is_cuda for kernels, _ in of_levels.values())
    with ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1) if compiled else 1) as pool:
        list(pool.map(_pack_nothing, of_levels.values()))
    return len(of_levels)


@torch.inference_mode()  # of this thread, as the engine that made the pages
def _pack_nothing(one: tuple[SiteKernels, Tensor | None]) -> None:
    from kvcompress.kernels.encode import pack_latents

    kernels, words = one
    counts, device = kernels.dense.counts, kernels.codec.encoder.device
    latents = kernels.dense.encoder.new_zeros(1, BLOCK_TOKENS, sum(counts.values()))
    gains = torch.zeros(BLOCK_TOKENS, dtype=torch.uint8, device=device)
    row = gains.new_empty(1, 1, row_words(counts, has_gain=kernels.codec.has_gain), dtype=torch.int32)
    nowhere = torch.full((1,), -1, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread begins on the first one
        pack_latents(latents, kernels.site(row), tiles=kernels.codec.tiles, gains=gains)
        if words is not None:
            kernels.write_pages(latents, words, nowhere, gains)
