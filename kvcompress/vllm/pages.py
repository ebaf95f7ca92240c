"""How packed codes and exact tokens lie in the pages of vLLM's cache.

A page of a compressed layer holds `n_blocks` blocks of 32 tokens: the rows of their keys, then the rows of their
values, as docs/format.md describes rows; each part begins at a multiple of 16 bytes, and nothing else is in it. An
exact page holds 32 tokens as vLLM lays them out: [KV heads, 32, 2 head_dim], a token's key beside its value. Pages of
all layers lie side by side in a block of vLLM's pool, and a block belongs to packed pages or to exact ones: so a
packed page takes as many tokens as give both about the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.model.model_spec import DTYPE_BYTES, Part, Site
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.site_plan import SitePlan

#: Kernels read 16 bytes at a time.
ALIGNMENT = 16
#: A page's tokens, and so the step of lengths that a shared prefix can have.
MOST_BLOCKS, FEWEST_BLOCKS = 32, 1


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def row_bytes(site: SitePlan, number_bytes: int) -> int:
    """Return the bytes of a block of 32 tokens at a site; number_bytes: of a number in the running dtype."""
    if site.exact:
        return BLOCK_TOKENS * site.width * number_bytes
    return BLOCK_TOKENS * site.bits_per_token // 8


def blocks_of_page(plan: Plan) -> int:
    """Return how many blocks a packed page holds: the power of two whose bytes come closest to an exact page's.

    Of keys in turns it is four where it would be two (keep 0.5): their kernels take four blocks at once where
    blocks are large, and without kernels no step of generation is recorded.
    """
    ideal = 1 / plan.keep if plan.keep else MOST_BLOCKS
    sizes = [1 << i for i in range(FEWEST_BLOCKS.bit_length() - 1, MOST_BLOCKS.bit_length())]
    # What is wasted if the larger kind of page sets the size of both.
    n = min(sizes, key=lambda n: (max(n, ideal) / min(n, ideal), -n))
    return 4 if n == 2 and any(site.turn > 1 for site in plan.sites) else n


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One layer's packed page. Sizes in bytes."""

    n_blocks: int
    key_row: int
    value_row: int

    @property
    def n_tokens(self) -> int:
        return self.n_blocks * BLOCK_TOKENS

    @property
    def value_start(self) -> int:
        return round_up(self.n_blocks * self.key_row, ALIGNMENT)

    @property
    def n_bytes(self) -> int:
        """At least ALIGNMENT: vLLM knows no page of no bytes, which a layer of no components would have."""
        return max(ALIGNMENT, self.value_start + round_up(self.n_blocks * self.value_row, ALIGNMENT))

    def rows(self, pages: Tensor, part: Part) -> Tensor:
        """Return the rows of a part as a view [n_pages, n_blocks, bytes of a row] of pages [n_pages, >= n_bytes],
        uint8."""
        start, size = (0, self.key_row) if part == "key" else (self.value_start, self.value_row)
        return pages[:, start : start + self.n_blocks * size].unflatten(1, (self.n_blocks, size))


def page_sizes(layouts: Mapping[int, PageLayout]) -> dict[int, int]:
    """Return the bytes of each layer's packed page, as vLLM groups them best.

    vLLM takes layers that all have different pages for a pattern that repeats, and then gives every other kind of page
    a group for each of its layers, each of which fills whole blocks of the pool by itself. So the two layers whose
    pages are closest get the larger size of the two; then it makes one group of each kind.
    """
    sizes = {layer: layout.n_bytes for layer, layout in layouts.items()}
    counts = Counter(sizes.values())
    if len(counts) == 1 or len(set(counts.values())) > 1:
        return sizes
    distinct = sorted(counts)
    smaller, larger = min(pairwise(distinct), key=lambda pair: pair[1] - pair[0])
    twin = next(layer for layer, size in sizes.items() if size == smaller)
    return sizes | {twin: larger}


@dataclass(frozen=True, slots=True)
class PoolBlock:
    """A block of the engine's pool: a page of every layer, packed or exact. own_bytes: of a token in the model's cache.

    exact_pages: what a sequence holds of exact ones, for its sinks and its window.
    """

    n_tokens: int
    n_bytes: int
    own_bytes: int
    exact_pages: int

    @classmethod
    def of(cls, plan: Plan) -> PoolBlock:
        """Return the blocks that the engine will have for a plan on one GPU, in the model's own dtype."""
        size, n_blocks = DTYPE_BYTES[plan.dtype], blocks_of_page(plan)
        sites = {s.site: row_bytes(s, size) for s in plan.sites}
        layers = {s.layer for s in plan.sites}
        layouts = {i: PageLayout(n_blocks, sites[Site(i, "key")], sites[Site(i, "value")]) for i in layers}
        exact = BLOCK_TOKENS * plan.original_bytes_per_token
        packed = sum(page_sizes(layouts).values())
        pages = exact_pages(plan.sinks, plan.recent)
        return cls(n_blocks * BLOCK_TOKENS, max(packed, exact), plan.original_bytes_per_token, pages)

    @property
    def bytes_per_token(self) -> float:
        """Of a packed token, padding included."""
        return self.n_bytes / self.n_tokens

    def times_the_tokens(self, length: int) -> float:
        """How many times the tokens fit in sequences of a length, window and sinks included."""
        blocks = -(-length // self.n_tokens) + self.exact_pages
        return length * self.own_bytes / (blocks * self.n_bytes)


def exact_pages(sinks: int, recent: int) -> int:
    """Return the exact pages that a sequence holds at most: of its sinks, of its window, and one not yet given back."""
    return -(-sinks // BLOCK_TOKENS) + -(-(recent + BLOCK_TOKENS) // BLOCK_TOKENS) + 1


def exact_parts(pages: Tensor) -> tuple[Tensor, Tensor]:
    """pages: [n_pages, heads, 32, 2 head_dim] -> views of keys and values, [n_pages, heads, 32, head_dim]."""
    head_dim = pages.shape[-1] // 2
    return pages[..., :head_dim], pages[..., head_dim:]


def visible_packed(computed: Tensor, table: Tensor, recent: int) -> Tensor:
    """Return how many tokens of each sequence the queries of a step see packed, int32 [n]; the others they see exactly.

    Those that were older than the window before the step, in whole blocks, as in CompressedCache. Where a prefix was
    found in the cache without exact pages of its last tokens (entries of 0, vLLM's null block), these are seen packed
    as well. computed: [n], tokens before the step. table: int32 [n, most], exact pages by position // 32.
    """
    computed = computed.to(torch.int32)
    first = (computed - recent).clamp_min(0) // BLOCK_TOKENS  # block of the first token that should be exact
    ahead = torch.arange(recent // BLOCK_TOKENS + 2, dtype=torch.int32, device=computed.device)
    block = first[:, None] + ahead
    page = table.gather(1, block.clamp(max=table.shape[1] - 1).long())
    missing = (page == 0) & (block * BLOCK_TOKENS < computed[:, None])
    # The missing pages are the first ones: what was found in the cache ends where the exact tokens begin.
    stop = torch.where(missing, block + 1, first[:, None]).amax(1)
    return torch.maximum(first, stop) * BLOCK_TOKENS
