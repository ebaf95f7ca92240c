"""Peers: quantised caches that people use today, measured in the same way as ours.

Here is what each is, in which chunks it decodes, and what it takes in bytes; peer_run.py runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.compat import DynamicLayer
from kvcompress.errors import OptionError
from kvcompress.evaluate import peer_fp4, peer_per_token_head, peer_turboquant
from kvcompress.evaluate.peer_caches import (
    GROUP,
    Fp8Layer,
    KiviLayer,
    PeerCache,
    QuantisedOnce,
    hqq_layer,
    quanto_layer,
)
from kvcompress.evaluate.token_formats import TokenFormat, TokenLayer
from kvcompress.model.model_spec import DTYPE_BYTES, ModelSpec
from kvcompress.runtime.layers import places_of
from kvcompress.runtime.places import Places

#: Bytes of a group's scale and zero together, in 16-bit dtypes; hqq and quanto keep them in the cache's own dtype.
_KIVI_SCALES = 4
#: The formats of families that store each token and head by itself: name of a peer -> how.
TOKEN_FORMATS: dict[str, TokenFormat] = {
    **{f"turboquant-{name}": form for name, form in peer_turboquant.PRESETS.items()},
    **{f"{name}-per-token-head": form for name, form in peer_per_token_head.FORMATS.items()},
    **peer_fp4.FORMATS,
}


@dataclass(frozen=True, slots=True)
class Peer:
    """A quantised cache: its family (hqq, quanto, kivi, fp8, turboquant, ...), bits a number, and exact window.

    once: hqq and quanto quantise each token once, where transformers quantises all anew when the window is full.
    form: of families that store each token and head by itself (TOKEN_FORMATS). exact_layers: at each end.
    """

    family: str
    bits: int
    residual: int = 128
    once: bool = False
    form: str = ""
    exact_layers: int = 0

    sinks: ClassVar[int] = 0  # first tokens that are exact

    @property
    def name(self) -> str:
        if self.form:
            every_layer = self.form.startswith(("turboquant", "ultraquant")) and not self.exact_layers
            return f"{self.form}{'-all-layers' * every_layer}"
        return self.family if self.family.startswith("fp8") else f"{self.family}-{self.bits}bit{'-once' * self.once}"

    @property
    def at_once(self) -> int | None:
        """Windows that may be decoded together: one where a scale is that of a whole text, else any number."""
        return 1 if self.family == "fp8" else None

    def cache_for(self, model: Any, spec: ModelSpec, ids: Tensor) -> PeerCache:
        """Return an empty cache for texts ids [batch, n_tokens]; layers that a model keeps a window in stay its own."""
        return self.new_cache(len(spec.layers), getattr(torch, spec.dtype), places_of(model, spec))

    def new_cache(self, n_layers: int, stored: torch.dtype, places: Places | None = None) -> PeerCache:
        """Return an empty cache that stores in the dtype `stored`. Raises OptionError if its package is missing.

        places: where the n_layers layers stand among the model's own, by default everywhere.
        """
        places = places or Places.all_of(n_layers)
        make = {
            "hqq": lambda: hqq_layer(self.bits, self.residual),
            "quanto": lambda: quanto_layer(self.bits, self.residual),
            "kivi": lambda: KiviLayer(self.bits, self.residual),
            "fp8": lambda: Fp8Layer(scaled=True),
            "fp8-unscaled": lambda: Fp8Layer(scaled=False),
            "token": lambda: TokenLayer(TOKEN_FORMATS[self.form]),
        }["token" if self.form else self.family]
        once = lambda: QuantisedOnce(make()) if self.once else make()  # noqa: E731
        exact = self._exact(places.layers, n_layers if places.own is None else len(places.own()))
        return PeerCache(places.filled([DynamicLayer if i in exact else once for i in places.layers]), stored)

    @property
    def keeps_window(self) -> bool:
        """Whether the latest tokens are exact: not where each is quantised as it comes."""
        return not (self.form or self.family.startswith("fp8"))

    def _exact(self, layers: Sequence[int], depth: int) -> set[int]:
        """Return which of the layers are exact, as vLLM chooses them: the model's first and last, never more than all.

        depth: all layers of the model, those with windows or states included.
        """
        n = min(self.exact_layers, depth // 2)
        return {i for i in layers if i < n or i >= depth - n}

    def _exact_of(self, spec: ModelSpec) -> set[int]:
        numbers = [*(a.layer for a in spec.layers), *(o.layer for o in spec.own_layers)]
        return self._exact([a.layer for a in spec.layers], 1 + max(numbers))

    def chunks(self, n_tokens: int) -> list[slice]:
        """Return the forwards that equal decoding: the first fills the window, the later ones end where it is full.

        For fp8 one chunk: its scale is that of the whole text, which is the best it can have.
        """
        if not self.keeps_window:
            return [slice(0, n_tokens)]
        step = [GROUP["kivi"]]
        if self.family != "kivi":
            # The last token of a window comes alone: transformers before 5.2x looks only then whether it is full.
            step = [self.residual - 1, 1] if self.residual > 1 else [1]
        bounds = [0, self.residual or step[0]]
        for length in cycle(step):
            if bounds[-1] >= n_tokens:
                break
            bounds.append(bounds[-1] + length)
        return [slice(a, min(b, n_tokens)) for a, b in pairwise(bounds)]

    def n_exact(self, n_tokens: int) -> int:
        """Return how many of n_tokens are stored exactly, decoded after a first chunk as `chunks` gives it."""
        if not self.keeps_window:
            return 0
        if self.family == "kivi":
            return n_tokens - max(0, n_tokens - self.residual) // GROUP["kivi"] * GROUP["kivi"]
        return 0 if n_tokens <= self.residual else n_tokens % max(1, self.residual)

    def bytes_per_token(self, spec: ModelSpec) -> float:
        """Return what a quantised token takes in all layers: codes, scales and zeros."""
        if self.form:
            exact = self._exact_of(spec)
            layer = {a.layer: 2 * a.width * DTYPE_BYTES[spec.dtype] for a in spec.layers}
            coded = {a.layer: a.n_kv_heads * TOKEN_FORMATS[self.form].head_bytes(a.head_dim) for a in spec.layers}
            return sum(layer[i] if i in exact else coded[i] for i in layer)
        return spec.cache_numbers_per_token * self._bytes_per_number(DTYPE_BYTES[spec.dtype])

    def cache_bytes(self, spec: ModelSpec, n_tokens: int) -> int:
        """Return the bytes of a cache of n_tokens: quantised ones, exact window, scales, the model's own layers."""
        exact = self.n_exact(n_tokens)
        scales = 2 * 4 * len(spec.layers) if self.family == "fp8" else 0
        quantised = round((n_tokens - exact) * self.bytes_per_token(spec))
        return quantised + exact * spec.cache_bytes_per_token + scales + spec.own_bytes(n_tokens)

    def measured_bytes_per_token(self, spec: ModelSpec) -> float:
        """Return the same from the storages of real caches: one layer filled with 1024 and with 2048 tokens.

        Exact layers are counted as the model stores them.
        """
        sizes = []
        one = replace(self, exact_layers=0)
        for n_tokens in (1024, 2048):
            cache = one.new_cache(1, getattr(torch, spec.dtype))
            attention = spec.layers[0]
            states = torch.ones(1, attention.n_kv_heads, n_tokens, attention.head_dim)
            cache.update(states, states, 0)
            sizes.append(cache.nbytes())
        n_exact = len(self._exact_of(spec))
        exact = n_exact * spec.cache_bytes_per_token / len(spec.layers)
        return (len(spec.layers) - n_exact) * (sizes[1] - sizes[0]) / 1024 + exact

    def bytes_per_token_within(self, spec: ModelSpec, seq_len: int) -> float:
        """Return the measured bytes of a quantised token in a text of seq_len: its own, since nothing is the text's."""
        return self.measured_bytes_per_token(spec)

    def _bytes_per_number(self, dtype_bytes: int) -> float:
        if self.family.startswith("fp8"):
            return 1.0
        scales = _KIVI_SCALES if self.family == "kivi" else 2 * dtype_bytes
        return self.bits / 8 + scales / GROUP[self.family]

    def check(self, spec: ModelSpec, seq_len: int) -> None:
        """Raise OptionError where this peer cannot store this model's cache, or would compress nothing of a window."""
        if len({layer.width for layer in spec.layers}) > 1 or any(layer.sliding_window for layer in spec.layers):
            raise OptionError(f"cache {self.name} is for models with equal layers of full attention only.")
        if self.form:
            TOKEN_FORMATS[self.form].head_bytes(spec.layers[0].head_dim)
        if not self.keeps_window:
            return
        width = spec.layers[0].width
        per_group = GROUP[self.family] * (8 // self.bits if self.family == "hqq" else 1)
        block = GROUP["kivi"] if self.family == "kivi" else max(1, self.residual)
        if self.family == "kivi" and width % per_group:
            raise OptionError(
                f"cache {self.name} packs groups of {per_group} channels, and a token of this model has {width} in a "
                "layer. Leave it out."
            )
        if block * width % per_group:
            raise OptionError(
                f"cache {self.name} packs groups of {per_group} numbers, and {block} tokens of {width} numbers do not "
                "divide into them. Choose a --recent of 128."
            )
        if seq_len <= self.residual + block:
            raise OptionError(
                f"windows of {seq_len} tokens hardly leave the exact window of cache {self.name} ({self.residual} "
                "tokens). Raise --seq-len or lower --recent."
            )


PEERS = {
    p.name: p
    for p in (
        Peer("hqq", 4),
        Peer("hqq", 2),
        Peer("hqq", 4, once=True),
        Peer("hqq", 2, once=True),
        Peer("quanto", 4),
        Peer("quanto", 2),
        Peer("quanto", 4, once=True),
        Peer("quanto", 2, once=True),
        Peer("kivi", 4),
        Peer("kivi", 2),
        Peer("fp8", 8, residual=0),
        Peer("fp8-unscaled", 8, residual=0),
        *(
            Peer("turboquant", bits, residual=0, form=f"turboquant-{preset}", exact_layers=layers)
            for preset, bits in (("k8v4", 8), ("4bit_nc", 4), ("k3v4_nc", 3), ("3bit_nc", 3))
            for layers in (peer_turboquant.EXACT_LAYERS, 0)
        ),
        Peer("per-token-head", 8, residual=0, form="int8-per-token-head"),
        Peer("per-token-head", 8, residual=0, form="fp8-per-token-head"),
        Peer("fp4", 4, residual=0, form="nvfp4"),
        *(
            Peer("fp4", 4, residual=0, form="ultraquant", exact_layers=layers)
            for layers in (peer_turboquant.EXACT_LAYERS, 0)
        ),
    )
}


def find_peer(name: str, *, residual: int | None = None) -> Peer:
    """Return a peer by name, with another exact window if given. Raises OptionError for what does not exist."""
    if name not in PEERS:
        raise OptionError(f"cache '{name}' is unknown. Choose from {', '.join(PEERS)}.")
    if residual is None:
        return PEERS[name]
    if not PEERS[name].keeps_window:
        raise OptionError(f"cache {name} keeps no token exactly: leave out --recent.")
    return replace(PEERS[name], residual=residual)
