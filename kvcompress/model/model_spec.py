"""What kvcompress must know of a model: where its keys and values are made, and what their cache costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Part = Literal["key", "value"]
PARTS: tuple[Part, Part] = ("key", "value")

#: Bytes of one number in each storage dtype that a checkpoint may have.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Site(NamedTuple):
    """One place where tokens are cached: a layer's keys or its values."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.part}"


@dataclass(frozen=True, slots=True)
class Projection:
    """Where a site's vector x is made: the weight rows, and the module whose output is x.

    `module` is the module path whose output holds x before RoPE (after any bias and key norm), in
    columns `start` to `stop` when the last dimension is flattened over heads.
    """

    weight: str
    bias: str | None
    module: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. Sizes in numbers; `rotary_dim` 0 means no RoPE in this layer."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    key: Projection
    value: Projection
    key_norm: bool = False
    sliding_window: int | None = None

    @property
    def width(self) -> int:
        """n: what all KV heads produce for one token, in numbers."""
        return self.n_kv_heads * self.head_dim

    def projection(self, part: Part) -> Projection:
        return self.key if part == "key" else self.value


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder model as kvcompress sees it."""

    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    layers: tuple[AttentionSpec, ...]
    tied_embeddings: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(a.layer, part) for a in self.layers for part in PARTS)

    def width(self, site: Site) -> int:
        return self.layers[site.layer].width

    @property
    def cache_numbers_per_token(self) -> int:
        return sum(2 * a.width for a in self.layers)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the model's own cache for one token, all layers, in the model's own dtype."""
        return self.cache_numbers_per_token * DTYPE_BYTES[self.dtype]

    @property
    def foldable_obstacle(self) -> str | None:
        """Why keys and values cannot be folded into smaller projections, or None where they can."""
        if any(a.key_norm for a in self.layers):
            return "keys are normalised per head after the projection (key norm), which a linear fold cannot pass"
        if any(a.key.weight == a.value.weight for a in self.layers):
            return "query, key and value share one fused projection (kvcompress export writes a llama without it)"
        if any(0 < a.rotary_dim < a.head_dim for a in self.layers):
            return "RoPE rotates a part of each head only, which a virtual head does not lay out"
        return None
