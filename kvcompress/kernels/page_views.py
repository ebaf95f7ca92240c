"""What kernels read of a cache that lies in pages: a step's query tokens, exact tokens, the rows of one site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError


@dataclass(frozen=True, slots=True)
class QueryTokens:
    """What the query tokens of a step see, int32 on the device; slots of a sequence are its positions.

    rows: [n], each one's row of the tables. lengths: [n], tokens it sees, itself the last; 0 where there is none, whose
    output is 0. encoded: [n], how many of them are packed, whole blocks of 32. pages: [rows, most pages] of packed
    tokens; exact_pages: [rows, most exact pages], of tokens 0, 32, ..., read from `encoded` on; sinks: [rows], where
    each row's sinks lie, read once any of its tokens is packed.
    """

    rows: Tensor
    lengths: Tensor
    encoded: Tensor
    pages: Tensor
    exact_pages: Tensor
    sinks: Tensor


@dataclass(frozen=True, slots=True)
class ExactPages:
    """Tokens kept exactly, in the model's dtype: keys and values [pages, tokens of a page, KV heads, head_dim].

    sink_keys, sink_values: [slots, n_sinks, KV heads, head_dim]. All may be views of larger pages: dense in the last
    dimension, and 16 bytes or a multiple from number to number in the others.
    """

    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor

    def __post_init__(self) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values"):
            x = getattr(self, name)
            odd = [stride for stride in x.stride()[:3] if stride * x.element_size() % 16]
            if x.dim() != 4 or x.stride(3) != 1 or odd or x.data_ptr() % 16 or x.element_size() != 2:
                raise OptionError(
                    f"exact {name} of {tuple(x.shape)}, strides {x.stride()}, {x.dtype} cannot be read. Expected "
                    "16-bit numbers [pages, tokens, KV heads, head_dim] whose heads begin at multiples of 16 bytes."
                )
        if self.sink_keys.stride() != self.sink_values.stride():
            raise OptionError("sink keys and sink values lie differently. Expected equal strides.")


def page_words(pages: Tensor, n_blocks: int, n_words: int, offset: int) -> Tensor:
    """Return the rows of one site in pages, a view [pages, n_blocks, n_words] int32, as GroupedSite.words.

    pages: uint8 [pages, bytes of a page], any stride between pages; offset: bytes before the first row. Raises
    OptionError where first rows would not begin at multiples of 16 bytes.
    """
    if pages.stride(1) != 1 or pages.stride(0) % 16 or (pages.data_ptr() + offset) % 16:
        raise OptionError(
            f"rows at byte {offset} of pages {pages.stride(0)} bytes apart do not begin at multiples of 16 bytes. "
            "Expected pages whose stride, address and parts are such multiples."
        )
    words = pages[:, offset : offset + 4 * n_blocks * n_words].view(torch.int32)
    return words.unflatten(1, (n_blocks, n_words))
