"""Random packed caches and float64 attention over them, written from the format alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.arguments import Angles, ExactTokens, angle_table
from kvcompress.kernels.layout import PackedSite


def pack_codes(codes: list[tuple[int, Tensor]], *, pad_words: int = 0) -> Tensor:
    """codes: [(bits, [batch, n_components, n_tokens])] by bits, descending -> words [batch, n_blocks, n_words]."""
    rows = []
    for bits, code in codes:
        batch, n, n_tokens = code.shape
        code = torch.nn.functional.pad(code, (0, -n_tokens % 32)).long() & ((1 << bits) - 1)
        lanes = code.view(batch, n, -1, bits, 32 // bits)  # each word's codes, from its low bit on
        word = (lanes << (torch.arange(32 // bits) * bits)).sum(-1)  # [batch, n, n_blocks, bits]
        rows.append(word.permute(0, 2, 1, 3).flatten(2))
    words = torch.nn.functional.pad(torch.cat(rows, -1), (0, pad_words))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def random_site(
    batch: int, n_tokens: int, counts: dict[int, int], n: int, *, size: float, pad_words: int = 0, gain: bool = False
) -> tuple[PackedSite, Tensor]:
    """Return a packed site and its exact z [batch, n_tokens, R] float64; `size` is the spread of a decoded number."""
    codes, z = [], []
    for bits in sorted(counts, reverse=True):
        if bits == 16:
            latent = torch.randn(batch, counts[bits], n_tokens).half()
            codes.append((bits, latent.view(torch.int16)))
            z.append(latent.double())
            continue
        spread = torch.randn(batch, counts[bits], n_tokens) * 2.0 ** (bits - 2) + 2.0 ** (bits - 1)
        code = spread.floor().clamp(0, 2**bits - 1)
        codes.append((bits, code))
        z.append(code.double() - (2.0 ** (bits - 1) - 0.5))
    latents = torch.cat(z, 1).transpose(1, 2)
    decoder = (
        torch.randn(latents.shape[2], n)
        * size
        / latents.shape[2] ** 0.5
        / latents.std((0, 1)).clamp_min(0.5)[:, None].float()
    )
    words = pack_codes(codes, pad_words=0 if gain else pad_words)
    if gain:
        gains = torch.randint(0, 16, (batch, 1, n_tokens))
        words = torch.cat([words, pack_codes([(4, gains)], pad_words=pad_words)], -1)
        latents = latents * torch.exp2((gains.double() - 4) / 4).transpose(1, 2)
    return PackedSite(words, dict(counts), decoder.half(), torch.randn(n) * size, gain), latents


@dataclass
class Case:
    """Arguments of packed_attention, and what it should return."""

    query: Tensor
    keys: PackedSite
    values: PackedSite
    first: Tensor
    last: Tensor
    n_blocks: int
    exact: ExactTokens
    mask: Tensor | None
    scaling: float
    angles: Angles | None
    expected: Tensor


def moved(value: Any, device: str) -> Any:
    """Return a tensor, or an object whose fields are tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def random_case(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    n_queries: int = 1,
    n_tokens: int = 700,
    n_recent: int = 70,
    n_sinks: int = 4,
    key_counts: dict[int, int],
    value_counts: dict[int, int],
    dtype: torch.dtype = torch.float16,
    first: list[int] | None = None,
    last: list[int] | None = None,
    masked: bool = False,
    pad_words: int = 0,
    gain: bool = False,
    key_mean: bool = False,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    n = kv_heads * head_dim
    keys, key_latents = random_site(batch, n_tokens, key_counts, n, size=1.0, pad_words=pad_words, gain=gain)
    values, value_latents = random_site(batch, n_tokens, value_counts, n, size=1.0, pad_words=pad_words, gain=gain)
    mean = keys.mean if key_mean else None
    keys = PackedSite(keys.words, keys.counts, keys.decoder, mean, gain)
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    query = torch.randn(batch, heads, n_queries, head_dim).to(dtype)
    exact = [torch.randn(batch, kv_heads, t, head_dim).to(dtype) for t in (n_recent, n_recent, n_sinks, n_sinks)]
    exact_mask = (torch.rand(batch, n_sinks + n_recent) > 0.3).to(torch.uint8) if masked else None
    mask = (torch.rand(batch, -(-n_tokens // 32) * 32) > 0.3).to(torch.uint8) if masked else None
    lo = torch.tensor([0] * batch if first is None else first, dtype=torch.int32)
    hi = torch.tensor([n_tokens] * batch if last is None else last, dtype=torch.int32)
    tokens = ExactTokens(*exact, exact_mask)
    angles = None
    if key_mean:  # positions of a left padded sequence begin before its first token that counts
        angles = Angles(angle_table(inv_freq, n_tokens), (lo - n_sinks).clamp_min(0))
    blocks = -(-n_tokens // 32)
    case = Case(query, keys, values, lo, hi, blocks, tokens, mask, head_dim**-0.5, angles, expected=torch.empty(0))
    case.expected = _float64(case, key_latents, value_latents, inv_freq)
    return case


def _float64(case: Case, key_latents: Tensor, value_latents: Tensor, inv_freq: Tensor) -> Tensor:
    batch, heads, n_queries, head_dim = case.query.shape
    kv_heads, n_tokens = case.exact.keys.shape[1], key_latents.shape[1]
    assert case.values.mean is not None

    def decoded(z: Tensor, decoder: Tensor) -> Tensor:
        return (z @ decoder.double()).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    mean = case.values.mean.double().view(1, kv_heads, 1, head_dim)
    k = [decoded(key_latents, case.keys.decoder), case.exact.sink_keys.double(), case.exact.keys.double()]
    if case.angles is not None:
        k[0] = k[0] + _rotated_mean(case, inv_freq, n_tokens)
    v = [decoded(value_latents, case.values.decoder) + mean]
    v += [case.exact.sink_values.double(), case.exact.values.double()]
    key, value = (torch.cat(x, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    place = torch.arange(n_tokens)
    seen = (place >= case.first[:, None]) & (place < case.last[:, None])
    if case.mask is not None:
        seen = seen & (case.mask[:, :n_tokens] != 0)
    n_exact = case.exact.keys.shape[2] + case.exact.sink_keys.shape[2]
    beside = torch.ones(batch, n_exact, dtype=torch.bool) if case.exact.mask is None else case.exact.mask != 0
    seen = torch.cat([seen, beside], 1)[:, None].expand(batch, n_queries, -1).clone()
    for i in range(n_queries):
        seen[:, i, seen.shape[2] - n_queries + i + 1 :] = False
    scores = (case.query.double() @ key.transpose(-1, -2)) * case.scaling
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def _rotated_mean(case: Case, inv_freq: Tensor, n_tokens: int) -> Tensor:
    """[batch, kv heads, n_tokens, head_dim]"""
    assert case.angles is not None and case.keys.mean is not None
    position = torch.arange(n_tokens) - case.angles.origin[:, None]
    angle = (position[..., None].double() * inv_freq.double())[:, None]
    re, im = case.keys.mean.double().view(1, case.exact.keys.shape[1], 1, -1).chunk(2, -1)
    return torch.cat([re * angle.cos() - im * angle.sin(), im * angle.cos() + re * angle.sin()], -1)
