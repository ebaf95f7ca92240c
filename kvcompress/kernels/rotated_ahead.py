"""Compiling what decodes from pages of keys encoded after RoPE before there are any.

Two of its kernels are compiled for each set of levels of a site, so that an engine's first steps would wait for one
compilation after the other: for minutes, with a plan that shares out bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import torch

from kvcompress.kernels.layout import PackedSite
from kvcompress.kernels.page_views import QueryTokens
from kvcompress.kernels.paged_rotated import RotatedLayer, rotated_attention

#: Threads that compile; Python's part of it they do one after the other.
_MOST = 16
#: Tokens of a sequence that is attended to: enough for as many splits as any variant has. Query tokens at once: more
#: launch what as many do.
_TOKENS, _QUERIES = 2048, 256


def compile_rotated(layers: Sequence[RotatedLayer], *, n_heads: int, most: int) -> None:
    """Compile what attends to pages, for one to `most` query tokens a step, no variant of a kernel twice.

    n_heads: of queries. Nothing is read from the pages, and nothing written.
    """
    if not layers:
        return
    device = layers[0].exact.keys.device

    @torch.inference_mode()  # of this thread, as the engine that made the pages
    def attend(layer: RotatedLayer, n: int = 1) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread begins on the first one
            _attend_to_nothing(layer, n, n_heads)

    most = min(most, _QUERIES)
    for n in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):  # what varies with the batch, at any site
        attend(layers[0], n)
    n_threads = min(_MOST, os.cpu_count() or 1) if device.type == "cuda" else 1  # Triton's interpreter is one thread's
    with ThreadPoolExecutor(n_threads) as pool:
        for at_once in rounds([_kinds(layer) for layer in layers], made=_kinds(layers[0])):
            list(pool.map(attend, (layers[i] for i in at_once)))


def rounds(needed: Sequence[frozenset[Hashable]], *, made: frozenset[Hashable]) -> list[list[int]]:
    """Return which entries to compile, one round after the other, so that all that is needed is made and no two
    entries of a round make the same. made: what is there already."""
    found, left, there = [], list(range(len(needed))), set(made)
    while left := [i for i in left if needed[i] - there]:
        at_once, making = list[int](), set[Hashable]()
        for i in left:
            if not (needed[i] - there) & making:
                at_once.append(i)
                making |= needed[i] - there
        there |= making
        found.append(at_once)
    return found


def _kinds(layer: RotatedLayer) -> frozenset[Hashable]:
    """Return what the kernels that read packed keys and values are compiled for."""
    values = layer.values
    scores = "scores", _kind(layer.keys), values.has_gain, math.gcd(values.words.stride(1), 16)
    return frozenset({scores, ("values", _kind(values))})


def _kind(site: PackedSite) -> Hashable:
    """Return a site's levels, and what its addresses and strides divide by."""
    levels = frozenset(bits for bits, n in site.counts.items() if n)
    strides = (math.gcd(n, 64) for n in site.words.stride()[:2])
    return levels, site.has_gain, site.mean is None, site.words.data_ptr() % 16, *strides


def _attend_to_nothing(layer: RotatedLayer, n: int, n_heads: int) -> None:
    layer = replace(layer, n_tokens=min(layer.n_tokens, _TOKENS))
    exact = layer.exact.keys
    none = torch.zeros(n, dtype=torch.int32, device=exact.device)
    table = none.new_zeros(n, max(1, -(-layer.n_tokens // exact.shape[1])))
    query = exact.new_zeros(n, n_heads, exact.shape[3])
    rotated_attention(layer, query, QueryTokens(none, none, none, table, table, none), torch.empty_like(query))
