"""What is timed: attention shapes, typical component counts, and layers filled with random codes."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvcompress.checkpoint.map_budget import turn_group
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import open_headers
from kvcompress.codec.codec import SiteCodec, layer_codecs
from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model import blocks
from kvcompress.model.config_fields import positive_int
from kvcompress.model.model_spec import AttentionSpec, Part, Projection
from kvcompress.model.rope import Rotary
from kvcompress.options import GAIN_BITS, LEVELS, QUAD, TILE_TOKENS
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.cache import CompressedLayer
from kvcompress.runtime.tokens import TokenLine

#: Exact tokens beside the packed ones, as generation has them.
SINKS, RECENT = 4, 64
#: c(b): what is left of a component's energy at b bits, for a Gaussian one.
_LEFT = {0: 1.0, 1: 0.363, 2: 0.119, 4: 0.0115, 8: 1e-4}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer, and of the model around it."""

    name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_layers: int
    d_model: int
    d_mlp: int
    n_vocab: int

    @property
    def width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def attention(self) -> AttentionSpec:
        nowhere = Projection(weight="", bias=None, module="", start=0, stop=self.width)
        return AttentionSpec(0, self.n_heads, self.n_kv_heads, self.head_dim, self.head_dim, nowhere, nowhere)


SHAPES = {
    s.name: s
    for s in (
        Shape("llama-3-8b", 32, 8, 128, 32, 4096, 14336, 128256),
        Shape("llama-3-70b", 64, 8, 128, 80, 8192, 28672, 128256),
        Shape("llama-2-7b", 32, 32, 128, 32, 4096, 11008, 32000),
        Shape("qwen-2.5-1.5b", 12, 2, 128, 28, 1536, 8960, 151936),
        Shape("smollm2-135m", 9, 3, 64, 30, 576, 1536, 49152),
        Shape("tiny", 4, 2, 32, 2, 128, 256, 512),
    )
}


def components_at_a_time(shape: Shape, turn: int) -> int:
    """Return how many components of a site get the same bits: a quad of each group of heads where rows have tiles."""
    if turn % TILE_TOKENS:
        return 1
    return QUAD * (shape.n_kv_heads // turn_group(shape.attention))


def typical_counts(n: int, keep: float, *, ranks_only: bool = False, at_a_time: int = 1) -> dict[int, int]:
    """Return how many components have how many bits when `keep` of 16 bits a number is shared out.

    Water-filling over the spectrum l_i = (i + 1)^-0.7 exp(-5 i / n), which falls like those of the models in
    docs/measurements.md. With ranks_only: the first components, at 16 bits. at_a_time: neighbours that get the same
    bits; it divides n and every count.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep is {keep:g}, it must lie between 0 and 1.")
    if ranks_only:
        return {16: max(1, int(n * keep / at_a_time + 1e-9)) * at_a_time}
    each = [(i + 1) ** -0.7 * math.exp(-5 * i / n) for i in range(n)]
    energy = [sum(each[i : i + at_a_time]) for i in range(0, n, at_a_time)]
    steps = dict(zip((0, *LEVELS[:-1]), LEVELS, strict=True))
    bits, left = [0] * len(energy), round(16 * n * keep) - GAIN_BITS
    heap = [(-e * (1 - _LEFT[LEVELS[0]]) / LEVELS[0], i) for i, e in enumerate(energy)]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        now = steps[bits[i]]
        cost = (now - bits[i]) * at_a_time
        if cost > left:
            continue
        left -= cost
        bits[i] = now
        if now in steps:
            after = steps[now]
            heapq.heappush(heap, (-energy[i] * (_LEFT[now] - _LEFT[after]) / (after - now), i))
    return {level: bits.count(level) * at_a_time for level in reversed(LEVELS) if level in bits}


def shape_of_output(directory: Path) -> tuple[Shape, dict[int, int], dict[int, int], int]:
    """Return the shape, key and value counts of the middle layer, by bits, and its turn, of a compressed checkpoint.

    Its model is that of the directory, or of the source that the plan names; of any family. Raises OptionError where
    no layer can be timed.
    """
    plan = Plan.load(directory)
    coded = {s.site: dict(s.bits) for s in plan.sites if not s.exact}
    turns = {s.layer: s.turn for s in plan.sites if s.part == "key" and (s.rotated or s.turn > 1)}
    with open_headers(directory if (directory / "config.json").is_file() else plan.source) as checkpoint:
        spec, fields = checkpoint.spec, checkpoint.config.get("text_config") or checkpoint.config
    layers = [a for a in spec.layers if sum(site.layer == a.layer for site in coded) == 2]
    if plan.form != "coded" or not layers:
        raise OptionError(f"{directory} has no layer whose keys and values are both coded: there is nothing to time.")
    layers = [a for a in layers if a.values is None]
    if not layers:
        raise OptionError(
            f"{directory} has keys and values of different sizes (latent attention), which are not timed."
        )
    layers = [a for a in layers if a.layer in turns]
    if not layers:
        raise OptionError(
            f"{directory} has keys that are un-rotated each by its own position, and rebuilt before they are read; "
            "what is timed are keys in turns, and those that commute with RoPE."
        )

    def n_bits(layer: int) -> int:
        return sum(b * n for site, found in coded.items() if site.layer == layer for b, n in found.items())

    middle = sorted(layers, key=lambda a: n_bits(a.layer))[len(layers) // 2]
    counts = {site.part: c for site, c in coded.items() if site.layer == middle.layer}
    d_mlp = positive_int(fields, "intermediate_size", 4 * spec.hidden_size)
    shape = Shape(
        directory.name, middle.n_heads, middle.n_kv_heads, middle.head_dim, len(spec.layers), spec.hidden_size, d_mlp,
        spec.vocab_size,
    )  # fmt: skip
    return shape, counts["key"], counts["value"], turns[middle.layer]


def random_layer(
    shape: Shape, keys: dict[int, int], values: dict[int, int], *, n_tokens: int, batch: int, device: torch.device,
    dtype: torch.dtype, turn: int = 1,
) -> CompressedLayer:  # fmt: skip
    """Return a layer that holds n_tokens random packed tokens of each sequence, sinks and a full window beside them.

    turn: see random_maps.
    """
    rotary = Rotary(5e5 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim), 1.0)
    maps = random_maps(shape, "key", keys, turn=turn), random_maps(shape, "value", values, turn=turn)
    key, value = layer_codecs(*maps, device, turn=turn)
    assert key is not None
    if turn > 1:
        codecs = LayerKernels(key, value, rotary, shape.n_kv_heads, shape.head_dim, turn=turn)
    else:
        mean, key.mean = key.mean, None
        codecs = LayerKernels(key, value, rotary, shape.n_kv_heads, shape.head_dim, True, mean)
    n_blocks = n_tokens // BLOCK_TOKENS
    tokens = TokenLine(SINKS, RECENT, counts_bytes=True)
    tokens.append(torch.arange(n_blocks * BLOCK_TOKENS + RECENT, device=device)[None], batch)
    layer = CompressedLayer(codecs, tokens)
    fill_layer(layer, n_blocks=n_blocks, n_recent=RECENT, batch=batch, device=device, dtype=dtype)
    return layer


def fill_layer(
    layer: CompressedLayer, *, n_blocks: int, n_recent: int, batch: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Put random packed blocks, n_recent exact tokens, and sinks (where anything is packed) into an empty layer."""
    codecs = layer.codecs

    def exact(n: int) -> Tensor:
        return torch.randn(batch, codecs.n_kv_heads, n, codecs.head_dim, device=device, dtype=dtype)

    layer.lazy_initialization(exact(0))
    layer.keys, layer.values = exact(n_recent), exact(n_recent)
    if n_blocks and codecs.key is not None and codecs.value is not None:
        layer.sink_keys, layer.sink_values = exact(layer.tokens.sinks), exact(layer.tokens.sinks)
        layer.packed_keys = _random_bytes(codecs.key, batch, n_blocks, device)
        layer.packed_values = _random_bytes(codecs.value, batch, n_blocks, device)


def random_maps(shape: Shape, part: Part, counts: dict[int, int], *, turn: int = 1) -> SiteMaps:
    """Return random maps whose decoded numbers have a spread of about 1.

    turn: of `latent` keys and values in groups of heads that the kernels take; 1: `frequency` keys, `latent` values.
    """
    attention = shape.attention
    if turn > 1:
        parts = blocks.head_groups(attention, turn_group(attention))
    else:
        parts = blocks.frequencies(attention) if part == "key" else torch.arange(shape.width)[None]
    n_components, width = sum(counts.values()), parts.shape[1]
    bits = torch.tensor([b for b in sorted(counts, reverse=True) for _ in range(counts[b])], dtype=torch.uint8)
    step = torch.where(bits < 16, 2.0 ** (2 - bits.float()), torch.ones(()))
    maps = torch.randn(n_components, width) / math.sqrt(n_components / len(parts))
    # each class evenly over the blocks, which rise within it as they do in a plan
    quad = QUAD if turn % TILE_TOKENS == 0 else 1
    block = [torch.arange(counts[b]) // quad * quad * len(parts) // counts[b] for b in sorted(counts, reverse=True)]
    return SiteMaps(parts.int(), maps, maps, torch.cat(block).int(), bits, step, torch.randn(parts.numel()))


def _random_bytes(codec: SiteCodec, batch: int, n_blocks: int, device: torch.device) -> Tensor:
    """Return random codes, but numbers of spread 1 where components have 16 bits, and gains of about 1."""
    n_bytes = sum((stop - start) * bits * BLOCK_TOKENS // 8 for bits, start, stop in codec.classes)
    packed = torch.randint(0, 256, (batch, n_blocks, n_bytes), dtype=torch.uint8, device=device)
    places = codec.number_places
    numbers = torch.randn(batch, n_blocks, len(places), device=device, dtype=torch.float16)
    packed.view(torch.float16)[..., places] = numbers
    if not codec.has_gain:
        return packed
    gains = torch.full((batch, n_blocks, GAIN_BITS * BLOCK_TOKENS // 8), 0x44, dtype=torch.uint8, device=device)
    return torch.cat([packed, gains], -1)
