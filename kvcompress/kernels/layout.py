"""The packed layout of one site, as the kernels see it, and the numbers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.options import BLOCK_TOKENS as BLOCK_TOKENS

#: Bits a component may have, in the order in which the classes lie in a row; 16 is a float16 latent.
LEVELS = (16, 8, 4, 2, 1)
#: Words of a block's gains: 32 codes of 4 bits; code c stands for 2^((c - 4) / 4).
GAIN_WORDS = 4


@dataclass(frozen=True, slots=True)
class PackedSite:
    """One site of the packed cache.

    words: [batch, n_blocks, n_words] int32, contiguous in its last dimension. counts: components of each number of
    bits; classes lie in a row by bits, descending. decoder: [n_components, n_kv_heads * head_dim], rows in packed
    order, steps folded in. mean: [n_kv_heads * head_dim] or None: of values, or of keys before RoPE. has_gain: after
    the components each row holds four words more, the gains of its 32 tokens as 4-bit codes.
    """

    words: Tensor
    counts: dict[int, int]
    decoder: Tensor
    mean: Tensor | None = None
    has_gain: bool = False

    def __post_init__(self) -> None:
        needed = row_words(self.counts, has_gain=self.has_gain)
        if self.words.shape[2] < needed or set(self.counts) - set(LEVELS):
            raise OptionError(
                f"a packed row of {self.words.shape[2]} words cannot hold components {self.counts}. "
                f"Expected {needed} words and bits of {LEVELS}."
            )

    @property
    def n_components(self) -> int:
        return sum(self.counts.values())

    @property
    def gain_word(self) -> int:
        """Where in a row the gains begin."""
        return n_words(self.counts)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Components of 16, 8, 4, 2 and 1 bits."""
        return tuple(self.counts.get(bits, 0) for bits in LEVELS)


def n_words(counts: dict[int, int]) -> int:
    """Return the int32 words of one block of 32 tokens: one word for each bit of a component."""
    return sum(bits * count for bits, count in counts.items())


def row_words(counts: dict[int, int], *, has_gain: bool) -> int:
    """Return the int32 words of one block of 32 tokens, gains included."""
    return n_words(counts) + (GAIN_WORDS if has_gain else 0)


def offsets(counts: dict[int, int], device: torch.device) -> Tensor:
    """Return what is subtracted from each component's code to give z: 2^(b-1) - 1/2, and 0 for 16 bits."""
    values = [0.0 if bits == 16 else 2.0 ** (bits - 1) - 0.5 for bits in LEVELS for _ in range(counts.get(bits, 0))]
    return torch.tensor(values, device=device)
