"""What kvcompress must know of a model: where its keys and values are made, and what their cache costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from kvcompress.documents import Within
from kvcompress.errors import UnsupportedModelError
from kvcompress.model.rotation import Rotation, channel_pairs

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
    """One layer's attention. Sizes in numbers; `rotary_dim` 0 means no RoPE in this layer.

    key, value: where they are made, None where only running the model showed them. `rotation` is known once the model
    was loaded; until then RoPE is taken to turn the first `rotary_dim` channels in half-split pairs. `readers`: the
    attention modules that get the cached tensors themselves; none where the model works on what the cache returns
    before it attends (latent attention, older files). `values`: the sizes of values, where they differ from keys'.
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    key: Projection | None = None
    value: Projection | None = None
    key_norm: bool = False
    sliding_window: int | None = None
    rotation: Rotation | None = None
    readers: tuple[str, ...] = ()
    values: AttentionSpec | None = None

    @property
    def width(self) -> int:
        """n: what all KV heads produce for one token, in numbers."""
        return self.n_kv_heads * self.head_dim

    def of(self, part: Part) -> AttentionSpec:
        """Return the sizes and the rotation of one part: these, or those of `values`, which by default do not turn."""
        if part == "key":
            return self
        return self.values or replace(self, rotary_dim=0, rotation=None)

    def projection(self, part: Part) -> Projection:
        """Return where a part is made. Raises UnsupportedModelError where no reader of its family says so."""
        projection = self.key if part == "key" else self.value
        if projection is None:
            raise UnsupportedModelError(
                f"layer {self.layer}: which weights make {part}s is not known of this family, or they are quantised. "
                "The coded form with calibration needs no such knowledge: leave out --folded and --no-calibration."
            )
        return projection

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of channels of a head that RoPE turns together."""
        if self.rotation is not None:
            return self.rotation.pairs()
        return channel_pairs(self.rotary_dim, 0, False)

    def turned(self, key: Rotation | None, value: Rotation | None) -> AttentionSpec:
        """Return the layer with its rotations as they were proven."""
        turned = replace(self, rotation=key, rotary_dim=0 if key is None else key.width)
        if value is None and self.values is None:
            return turned
        values = self.values or replace(self, values=None)
        return replace(turned, values=values.turned(value, None))


@dataclass(frozen=True, slots=True)
class OwnLayer:
    """A layer that keeps transformers' own cache layer: it holds `window` tokens at most, or a state, or nothing.

    numbers: of one token, where it holds tokens. state_bytes: of one sequence, whatever its length.
    """

    layer: Annotated[int, Within(0, 9999)]
    kind: Annotated[str, Within(0, 200)]
    window: Annotated[int, Within(1, 1 << 40)] | None = None
    numbers: Annotated[int, Within(0, 1 << 24)] = 0
    state_bytes: Annotated[int, Within(0, 1 << 50)] = 0

    def nbytes(self, n_tokens: int, number_bytes: int) -> int:
        """Return its bytes after n_tokens; transformers keeps one token less than the window."""
        held = n_tokens if self.window is None else min(n_tokens, self.window - 1)
        return held * self.numbers * number_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder model as kvcompress sees it.

    layers: those whose keys and values are compressed; own_layers: the others. probed: read off the running model
    instead of its config.json; only then, attending: the modules that call the attention interface.
    """

    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    layers: tuple[AttentionSpec, ...]
    tied_embeddings: bool = False
    own_layers: tuple[OwnLayer, ...] = ()
    probed: bool = False
    attending: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(a.layer, part) for a in self.layers for part in PARTS)

    def attention(self, site: Site) -> AttentionSpec:
        """Return the sizes and the rotation of a site."""
        return next(a for a in self.layers if a.layer == site.layer).of(site.part)

    def width(self, site: Site) -> int:
        return self.attention(site).width

    @property
    def max_width(self) -> int:
        return max(self.width(site) for site in self.sites)

    def turned(self, rotations: Mapping[Site, Rotation]) -> ModelSpec:
        """Return the spec with rotations proven on the loaded model; sites that are not named do not turn."""
        layers = [a.turned(*(rotations.get(Site(a.layer, part)) for part in PARTS)) for a in self.layers]
        return replace(self, layers=tuple(layers))

    @property
    def rotations(self) -> dict[Site, Rotation]:
        """The rotation of every site that has one."""
        found = {site: self.attention(site).rotation for site in self.sites if site.part == "key"}
        found |= {Site(a.layer, "value"): a.values.rotation for a in self.layers if a.values is not None}
        return {site: rotation for site, rotation in found.items() if rotation is not None}

    @property
    def window(self) -> int | None:
        """The window that every compressed layer has: where all layers have one, what is in it is compressed."""
        return self.layers[0].sliding_window

    @property
    def cache_numbers_per_token(self) -> int:
        """Numbers that each further token adds to the cache."""
        return sum(a.of(part).width for a in self.layers for part in PARTS)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that each further token adds to the model's own cache, all layers, in the model's own dtype."""
        return self.cache_numbers_per_token * DTYPE_BYTES[self.dtype]

    def cache_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the model's own cache after n_tokens of one sequence; of a window one less is kept."""
        held = n_tokens if self.window is None else min(n_tokens, self.window - 1)
        return held * self.cache_bytes_per_token + self.own_bytes(n_tokens)

    def own_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the layers that are not compressed, after n_tokens of one sequence."""
        return sum(o.nbytes(n_tokens, DTYPE_BYTES[self.dtype]) for o in self.own_layers)

    @property
    def is_fused(self) -> bool:
        """Whether keys and values come out of one weight."""
        pairs = [(a.key, a.value) for a in self.layers]
        return any(key is not None and value is not None and key.weight == value.weight for key, value in pairs)

    @property
    def foldable_obstacle(self) -> str | None:
        """Why keys and values cannot be folded into smaller projections, or None where they can."""
        if any(a.key_norm for a in self.layers):
            return "keys are normalised per head after the projection (key norm), which a linear fold cannot pass"
        if any(a.key is None or a.value is None for a in self.layers):
            return "which weights make keys and values is not known of this model family, or they are quantised"
        if self.own_layers:
            return "some of its layers keep a window or a state, which virtual heads do not lay out"
        if self.is_fused:
            return "query, key and value share one fused projection (kvcompress export writes a llama without it)"
        if any(0 < a.rotary_dim < a.head_dim for a in self.layers):
            return "RoPE rotates a part of each head only, which a virtual head does not lay out"
        return None
