"""Watching a transformers model run: what its attention modules hand to the cache, and who reads what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress import compat

_RECORDING = "kvcompress_recording"


class Update(NamedTuple):
    """Keys and values as a layer's attention hands them to the cache: [batch, heads, n_tokens, width] each."""

    key: Tensor
    value: Tensor

    @property
    def numbers(self) -> int:
        """Numbers a token."""
        return sum(x.shape[1] * x.shape[3] for x in self)


class Reader(NamedTuple):
    """An attention module that gets the very tensors that a cache layer returned.

    is_plain: its attention was seen to give what plain_attention gives.
    """

    module: str
    layer: int
    n_heads: int
    is_plain: bool


class _Returned(NamedTuple):
    key: Tensor
    value: Tensor
    layer: int


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """A layer of the model's own cache: its class, its window, whether it grows with the text, its state in bytes.

    keeps_only_tokens: beside that state.
    """

    kind: str
    window: int | None
    grows: bool
    state_bytes: int
    keeps_only_tokens: bool


@dataclass
class Recorded:
    """What one forward did. updates: by layer of the cache; readers: in the order in which they ran.

    repeated: layers of the cache that got keys and values more than once.
    """

    cache: Any
    updates: dict[int, Update] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    cache_layers: list[CacheLayer] = field(default_factory=list)
    attending: dict[str, None] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.updates.values())).key.dtype


@contextmanager
def recorded(model: Any, instead: Callable[[Tensor], Tensor] | None = None) -> Iterator[Recorded]:
    """Within the block, one forward with the yielded `cache` is written down; the model is given back as it was.

    instead: given what attention gives [batch, n_tokens, heads, width], in the order of calls, what is gone on with.
    """
    run = Recorded(compat.own_cache(model))
    returned: dict[int, _Returned] = {}  # the tensors are kept, so that an id names one of them only
    for index, layer in enumerate(run.cache.layers):
        _record_updates(layer, index, run, returned)
    names = {id(module): name for name, module in model.named_modules()}

    def attend(module: Any, own: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        result = compat.own_attention(module, own)(module, query, key, value, mask, **kwargs)
        run.attending[names[id(module)]] = None
        if id(key) in returned:
            found = returned[id(key)]
            as_it_came = key is found.key and value is found.value
            ours = _ours(query, key, value, mask, kwargs) if as_it_came else None
            is_plain = ours is not None and _same(ours, result[0])
            run.readers.append(Reader(names[id(module)], found.layer, query.shape[1], is_plain))
        return result if instead is None else (instead(result[0]), *result[1:])

    with compat.attention_replaced(model, _RECORDING, attend):
        yield run
    run.cache_layers = [_cache_layer(layer) for layer in run.cache.layers]


def extras_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what changes attention beside its mask and its scale: a soft cap of scores, sinks as parameters."""
    return {name: kwargs[name] for name in ("softcap", "s_aux") if kwargs.get(name) is not None}


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Return the attention that every path of ours computes: [batch, n_queries, heads, width of values].

    softcap: scores are c tanh(score / c) (Gemma 2, arXiv 2408.00118); s_aux: [heads], a score that every query has
    beside those of its keys (gpt-oss, arXiv 2508.10925). mask: bool or additive; None is causal.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = capped(query @ key.transpose(2, 3) * scaling, softcap)
    n_queries, n_keys = scores.shape[2:]
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)
    mask = mask[..., :n_keys]
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        aside = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:2], n_queries, 1)
        scores = torch.cat([scores, aside.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :n_keys]
    return (weights @ value).transpose(1, 2)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Return scores as a soft cap leaves them: softcap * tanh(scores / softcap), of the same shape (Gemma 2)."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _ours(query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return what our attention gives, or None where it cannot be meant."""
    if mask is not None and mask.shape[1] > 1:  # by head: the model may have made it of what its cache returned
        return None
    if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3] or key.shape[1] != value.shape[1]:
        return None
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return plain_attention(query, key, value, mask, scaling=scaling, **extras_of(kwargs))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.is_meta:
        return ours.shape == theirs.shape
    within = 1e-3 if ours.dtype == torch.float32 else 4e-2
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= within * theirs.norm())


def _record_updates(layer: Any, index: int, run: Recorded, returned: dict[int, _Returned]) -> None:
    own = getattr(layer, "update", None)
    if own is None:
        return

    def update(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if key is not None:
            if index in run.updates:
                run.repeated.add(index)
            run.updates[index] = Update(key, value)
        result = own(key, value, *args, **kwargs)
        if key is not None:
            returned[id(result[0])] = _Returned(result[0], result[1], index)
        return result

    layer.update = update


def _cache_layer(layer: Any) -> CacheLayer:
    """Return what a cache layer is, after a forward."""
    window, keeps_only_tokens = getattr(layer, "sliding_window", None), compat.keeps_only_tokens(layer)
    return CacheLayer(
        kind=type(layer).__name__,
        window=window,
        grows=window is None and getattr(layer, "keys", None) is not None and keeps_only_tokens,
        state_bytes=compat.state_bytes(layer),
        keeps_only_tokens=keeps_only_tokens,
    )
