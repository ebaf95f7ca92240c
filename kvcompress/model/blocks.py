"""Partitions of a site's n = n_kv_heads * head_dim numbers into blocks, as index tensors [n_blocks, width].

Number h * head_dim + c of a site is channel c of head h. RoPE rotates pairs of channels of each head together
(AttentionSpec.pairs); the others are paired among themselves, those half as many apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.model.model_spec import AttentionSpec


def head_groups(attention: AttentionSpec, n_heads: int) -> Tensor:
    """Return blocks of `n_heads` neighbouring KV heads each: [n_kv_heads / n_heads, n_heads * head_dim]."""
    if n_heads < 1 or attention.n_kv_heads % n_heads:
        raise OptionError(
            f"layer {attention.layer}: {attention.n_kv_heads} KV heads cannot be split into groups of {n_heads}. "
            "Choose a divisor."
        )
    return torch.arange(attention.width).reshape(attention.n_kv_heads // n_heads, -1)


def channels(attention: AttentionSpec) -> Tensor:
    """Return one block per channel, holding that channel of every head: [head_dim, n_kv_heads]."""
    return torch.arange(attention.width).reshape(attention.n_kv_heads, attention.head_dim).T.contiguous()


def channel_pairs(attention: AttentionSpec) -> Tensor:
    """Return the pairs of channels that one RoPE frequency rotates: [head_dim / 2, 2]."""
    turning = attention.pairs()
    rest = sorted(set(range(attention.head_dim)) - {channel for pair in turning for channel in pair})
    return torch.tensor([*turning, *zip(rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True)])


def frequencies(attention: AttentionSpec) -> Tensor:
    """Return one block per RoPE frequency, first the real, then the imaginary numbers of all heads.

    [head_dim / 2, 2 * n_kv_heads]
    """
    return bands(attention, 2)


def bands(attention: AttentionSpec, n_channels: int) -> Tensor:
    """Return blocks of `n_channels` / 2 neighbouring frequencies over all heads.

    [head_dim / n_channels, n_channels * n_kv_heads]; within a block: pair member, frequency, head.
    """
    if n_channels < 2 or n_channels % 2 or attention.head_dim % n_channels:
        raise OptionError(
            f"layer {attention.layer}: head_dim {attention.head_dim} cannot be split into bands of {n_channels} "
            "channels. Choose an even divisor."
        )
    by_channel = channels(attention)  # [head_dim, n_kv_heads]
    pairs = by_channel[channel_pairs(attention)]  # [head_dim / 2, 2, n_kv_heads]
    grouped = pairs.reshape(attention.head_dim // n_channels, n_channels // 2, 2, attention.n_kv_heads)
    return grouped.transpose(1, 2).reshape(attention.head_dim // n_channels, -1)
