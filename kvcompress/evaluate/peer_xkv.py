"""xKV (Chang et al., arXiv 2503.18893; ICML 2026): one low-rank factorisation for the caches of neighbouring layers.

The keys of a group of layers before RoPE, side by side [n_tokens, layers * n], are factorised by the SVD of the text
itself when its prompt is read; values likewise. What is stored is one latent for each token and group, and the right
singular vectors of each text. As published: groups of four layers, keys two fifths of the ranks and values three (512
and 768 of the 8B shape's 4,096), no layer left out.

Departs in xKV's favour: the bases are those of the whole text, tokens to come included, where a server has the prompt
only; the first and the latest tokens stay exact as in our cache. A budget is what the latents take, as in the paper;
the bases are counted beside it, since every text has its own. Tokens that leave the window are projected on the bases,
as multi-turn use does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import DynamicLayer, cache_argument, decoder_of, own_cache
from kvcompress.errors import OptionError
from kvcompress.evaluate.peer_caches import PeerCache, by_token
from kvcompress.model.model_spec import DTYPE_BYTES, PARTS, AttentionSpec, ModelSpec, Part
from kvcompress.model.probe import proven
from kvcompress.model.rope import Rotary
from kvcompress.plan import BLOCK_TOKENS, n_encoded
from kvcompress.runtime.layers import places_of

#: Layers that share a latent, and how the ranks are shared out between keys and values: the paper's.
LAYERS = 4
_SHARE: dict[Part, float] = {"key": 0.8, "value": 1.2}


@dataclass(frozen=True, slots=True)
class Xkv:
    """xKV at a budget: share of the bytes that latents take; sinks and residual: first and latest tokens kept exact."""

    keep: float
    sinks: int
    residual: int
    layers: int = LAYERS
    name: str = "xkv"
    family: str = "xkv"
    form: str = ""
    at_once: int | None = None

    def check(self, spec: ModelSpec, seq_len: int) -> None:
        """Raise OptionError where the layers cannot share a latent, or a budget leaves no rank."""
        if len({(a.n_kv_heads, a.head_dim, a.values) for a in spec.layers}) > 1 or spec.layers[0].values is not None:
            raise OptionError("xkv is for models whose layers cache keys and values of one size.")
        if any(a.sliding_window for a in spec.layers):
            raise OptionError("xkv is for layers of full attention only.")
        if not all(self._ranks(spec, len(group))[part] for group in self._groups(spec) for part in PARTS):
            raise OptionError(f"keep {self.keep} leaves xkv no rank. Raise --keep.")
        if seq_len <= self.residual + BLOCK_TOKENS:
            raise OptionError(f"windows of {seq_len} tokens leave xkv nothing. Raise --seq-len or lower --recent.")

    def _groups(self, spec: ModelSpec) -> list[tuple[AttentionSpec, ...]]:
        return [spec.layers[i : i + self.layers] for i in range(0, len(spec.layers), self.layers)]

    def _ranks(self, spec: ModelSpec, n_layers: int) -> dict[Part, int]:
        width = n_layers * spec.layers[0].width
        return {part: min(width, int(self.keep * share * width + 1e-9)) for part, share in _SHARE.items()}

    def chunks(self, n_tokens: int) -> list[slice]:
        """Return the forwards that equal decoding: between two of them a block of tokens leaves the window."""
        bounds = [0, *range(min(n_tokens, self.residual + BLOCK_TOKENS), n_tokens, BLOCK_TOKENS), n_tokens]
        return [slice(a, b) for a, b in pairwise(bounds) if b > a]

    def cache_for(self, model: Any, spec: ModelSpec, ids: Tensor) -> XkvCache:
        """Return an empty cache with the bases of the texts ids [batch, n_tokens], from a run with an exact cache."""
        cache = self._new_cache(proven(model, spec), places_of(model, spec).filled)
        exact, decoder = own_cache(model), decoder_of(model)
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=True, **cache_argument(decoder, exact))
        for group in cache.groups:
            group.fit([(exact.layers[a.layer].keys, exact.layers[a.layer].values) for a in group.layers])
        return cache

    def _new_cache(self, spec: ModelSpec, filled: Any = None) -> XkvCache:
        stored = getattr(torch, spec.dtype)
        groups = [
            Group(layers, self._ranks(spec, len(layers)), self.sinks, self.residual, stored)
            for layers in self._groups(spec)
        ]
        make = [partial(XkvLayer, group, i) for group in groups for i in range(len(group.layers))]
        return XkvCache(groups, [one() for one in make] if filled is None else filled(make), stored)

    def bytes_per_token(self, spec: ModelSpec) -> float:
        """Return what a token's latents take in all groups."""
        ranks = [self._ranks(spec, len(group)) for group in self._groups(spec)]
        return sum(r[part] for r in ranks for part in PARTS) * DTYPE_BYTES[spec.dtype]

    def bytes_of_a_text(self, spec: ModelSpec) -> int:
        """Return what a text's bases take, however long it is."""
        width, groups = spec.layers[0].width, self._groups(spec)
        numbers = sum(len(g) * width * self._ranks(spec, len(g))[part] for g in groups for part in PARTS)
        return numbers * DTYPE_BYTES[spec.dtype]

    def cache_bytes(self, spec: ModelSpec, n_tokens: int) -> int:
        """Return the bytes of a cache of n_tokens: latents, bases, exact tokens, the model's own layers."""
        old = n_encoded(n_tokens, self.residual)
        exact = n_tokens - old + (min(self.sinks, old) if old else 0)
        latents = round(old * self.bytes_per_token(spec))
        held = exact * spec.cache_bytes_per_token + spec.own_bytes(n_tokens)
        return latents + self.bytes_of_a_text(spec) + held

    def measured_bytes_per_token(self, spec: ModelSpec) -> float:
        """Return the same from the storages of real caches, filled with 1024 and with 2048 tokens."""
        sizes = []
        for n_tokens in (1024, 2048):
            cache = self._new_cache(spec)
            states = torch.ones(1, spec.layers[0].n_kv_heads, n_tokens, spec.layers[0].head_dim)
            for group in cache.groups:
                group.bases = {p: torch.zeros(1, group.width, r, dtype=group.stored) for p, r in group.ranks.items()}
            for i in range(len(cache.layers)):
                cache.update(states, states, i)
            for group in cache.groups:
                group.evict()
            sizes.append(cache.nbytes())
        return (sizes[1] - sizes[0]) / 1024

    def bytes_per_token_within(self, spec: ModelSpec, seq_len: int) -> float:
        """Return the measured bytes of an old token in a text of seq_len, with its share of the text's bases."""
        return self.measured_bytes_per_token(spec) + self.bytes_of_a_text(spec) / n_encoded(seq_len, self.residual)


class Group:
    """Neighbouring layers that share latents: their bases, the latents of old tokens, and their cache layers."""

    def __init__(
        self, layers: Sequence[AttentionSpec], ranks: dict[Part, int], sinks: int, recent: int, stored: torch.dtype
    ) -> None:
        self.layers, self.ranks, self.sinks, self.recent = layers, ranks, sinks, recent
        self.stored = stored if stored == torch.float32 else torch.float16  # more exact than bfloat16
        self.width = sum(a.width for a in layers)
        self.bases: dict[Part, Tensor] = {}  # [batch, width, rank], the layers' numbers one after the other
        self.latents: dict[Part, Tensor] = {}  # [batch, n_old, rank]
        self.members: list[XkvLayer] = []
        self._rotary = [None if a.rotation is None else Rotary.by(a.rotation) for a in layers]

    @property
    def n_old(self) -> int:
        return self.latents["key"].shape[1] if self.latents else 0

    def fit(self, cached: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the bases: of each text's own keys and values [batch, heads, n_tokens, head_dim], one pair a layer."""
        for part, states in zip(PARTS, zip(*cached, strict=True), strict=True):
            x = self._side_by_side(part, states, 0)
            vectors = torch.linalg.eigh(x.transpose(1, 2) @ x)[1]  # rising
            self.bases[part] = vectors[..., -self.ranks[part] :].flip(-1).to(self.stored)

    def evict(self) -> None:
        """Project the oldest exact tokens that are outside of the window, in whole blocks, and let them go."""
        held = self.members[0].keys.shape[2]
        n_leaving = n_encoded(held, self.recent)
        if not n_leaving:
            return
        for part in PARTS:
            states = [m.exact(part)[:, :, :n_leaving] for m in self.members]
            x = self._side_by_side(part, states, self.n_old)
            new = (x @ self.bases[part].float()).to(self.stored)
            old = self.latents.get(part)
            self.latents[part] = new if old is None else torch.cat([old, new], 1)
        for member in self.members:
            member.forget(n_leaving, self.sinks)

    def rebuilt(self, part: Part, index: int) -> Tensor:
        """Return a layer's old tokens as attention sees them: [batch, heads, n_old, head_dim], float32."""
        a, start = self.layers[index], sum(b.width for b in self.layers[:index])
        rows = self.bases[part][:, start : start + a.width].float()
        x = self.latents[part].float() @ rows.transpose(1, 2)
        x = x.unflatten(-1, (a.n_kv_heads, a.head_dim)).transpose(1, 2)
        rotary = self._rotary[index]
        return x if part == "value" or rotary is None else rotary.rotate(x, _positions(0, x))

    def _side_by_side(self, part: Part, states: Sequence[Tensor], first: int) -> Tensor:
        """Return what is factorised of tokens from position `first` on: [batch, n_tokens, width], keys before RoPE."""
        plain = []
        for x, rotary in zip(states, self._rotary, strict=True):
            turned = rotary if part == "key" else None
            plain.append(by_token(x.float() if turned is None else turned.unrotate(x, _positions(first, x))))
        return torch.cat(plain, -1)


def _positions(first: int, x: Tensor) -> Tensor:
    return torch.arange(first, first + x.shape[2], device=x.device).expand(x.shape[0], -1)


class XkvLayer(DynamicLayer):
    """One layer of a group: exact recent tokens and sinks; old tokens are rebuilt from the group's latents."""

    def __init__(self, group: Group, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        group.members.append(self)

    def get_seq_length(self) -> int:
        return self.group.n_old + self.keys.shape[2] if self.is_initialized else 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        elif self.index == 0:  # a new forward: all layers of the group hold the same tokens
            self.group.evict()
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        return self._all("key", self.keys, self.sink_keys), self._all("value", self.values, self.sink_values)

    def exact(self, part: Part) -> Tensor:
        return self.keys if part == "key" else self.values

    def forget(self, n_tokens: int, sinks: int) -> None:
        """Drop the oldest exact tokens, but for the sinks of the text among them."""
        if self.sink_keys is None:
            self.sink_keys, self.sink_values = (x[:, :, :sinks].clone() for x in (self.keys, self.values))
        self.keys, self.values = self.keys[:, :, n_tokens:].clone(), self.values[:, :, n_tokens:].clone()

    def _all(self, part: Part, recent: Tensor, sinks: Tensor | None) -> Tensor:
        if sinks is None:
            return recent
        old = self.group.rebuilt(part, self.index)[:, :, sinks.shape[2] :].to(recent.dtype)
        return torch.cat([sinks, old, recent], 2)


class XkvCache(PeerCache):
    """A cache whose layers share the latents of their groups."""

    def __init__(self, groups: list[Group], layers: list[Any], stored: torch.dtype) -> None:
        super().__init__(layers, stored)
        self.groups = groups

    def nbytes(self) -> int:
        """Bytes of all storages: exact tokens, latents, and the bases of the texts."""
        shared = [t for g in self.groups for t in (*g.latents.values(), *g.bases.values())]
        return super().nbytes() + sum(t.untyped_storage().nbytes() for t in shared)
