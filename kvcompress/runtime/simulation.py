"""The decode-faithful evaluation: what decoding token by token gives, computed for all queries of a text at once.

A forward is given a SimulatedCache instead of a cache. It stores nothing; attention sees exactly what is near, and what
is far as its codecs would give it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.codec.layer import LayerCodecs
from kvcompress.errors import OptionError
from kvcompress.model.recording import capped
from kvcompress.runtime.attended import AttendedCache
from kvcompress.runtime.places import Places, not_simulated
from kvcompress.runtime.tokens import TokenLine
from kvcompress.side_by_side import side_by_side

#: Queries scored at once: on a processor as many as have weights that stay in its cache. Each processor has pieces of
#: its own: beside other work, threads that share such small steps wait for one another most of the time. On a GPU, in
#: texts of up to _SHORT tokens more, because there its kernels take less time than to start them.
_ON_A_CPU, _ON_A_GPU, _OF_SHORT_TEXTS, _SHORT = 64, 256, 512, 2048

Reader = Callable[[Tensor], None]
"""Told of some queries at a time the weights of what they see compressed, 0 for all else: [batch, kv heads,
groups * n_queries, n], of the first n tokens."""
Watch = Callable[[LayerCodecs, Tensor | None, Tensor], Reader]
"""Called with a layer's codecs, its values' latents (None where they are kept whole) and its values, for each attention
that reads them."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """Which keys a query sees exactly: the first `sinks`, and `recent` tokens back.

    Generation encodes whole blocks, so that a query sees up to a block more exactly; `block` of 1 never flatters.
    watch: told of what queries see compressed.
    """

    sinks: int
    recent: int
    block: int = 1
    watch: Watch | None = None


_running: ContextVar[dict[int, Simulation]] = ContextVar("kvcompress_simulations", default={})  # noqa: B039 - never changed


@contextmanager
def simulating(attachment: object, simulation: Simulation) -> Iterator[None]:
    """Within the block, in this thread, forwards of the attachment's model that are given no cache are simulated."""
    token = _running.set(_running.get() | {id(attachment): simulation})
    try:
        yield
    finally:
        _running.reset(token)


def simulation_of(attachment: object) -> Simulation | None:
    """Return how this thread simulates forwards of the attachment's model, or None."""
    return _running.get().get(id(attachment))


class SimulatedLayer(compat.CacheLayer):
    """One layer of a SimulatedCache: knows its codecs, and gives keys and values back as they come."""

    is_sliding = False
    is_compileable = False

    def __init__(self, codecs: LayerCodecs, tokens: TokenLine, simulation: Simulation) -> None:
        super().__init__()
        self.codecs, self.tokens, self.simulation = codecs, tokens, simulation

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return compat.n_queries(query_length), 0

    def get_max_length(self) -> int:
        return -1


class SimulatedCache(AttendedCache):
    """What a simulated forward is given as its cache; it serves one."""

    def __init__(self, codecs: Sequence[LayerCodecs], simulation: Simulation, places: Places | None = None) -> None:
        self.tokens = TokenLine(simulation.sinks, simulation.recent, counts_bytes=False)
        self.places = places or Places.all_of(len(codecs))
        if not self.places.are_all_read:
            raise not_simulated()
        make = [partial(SimulatedLayer, c, self.tokens, simulation) for c in codecs]
        super().__init__(layers=self.places.filled(make))
        self._used = False

    def begin(self, positions: Tensor, batch: int, mask: Tensor | None) -> None:
        if self._used:
            raise OptionError("a simulated forward reads a whole text: what it returns as its cache holds none of it.")
        self._used = True
        self.tokens.append(positions, batch)


def simulated_attention(
    layer: SimulatedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Return what decoding token by token would give, for a whole text at once: [batch, n_tokens, heads, width].

    Query t sees key s exactly if s is a sink or not yet encoded (with blocks of 1: t - s <= recent), decoded otherwise.
    """
    codecs, tokens, (batch, n_kv_heads, n_tokens, _) = layer.codecs, layer.tokens, key.shape
    recent, sinks, block = layer.simulation.recent, layer.simulation.sinks, layer.simulation.block
    positions = tokens.key_positions(0, n_tokens, codecs.turn).to(key.device)
    coded_key = codecs.roundtrip_keys(key, positions).transpose(-1, -2)
    latents = codecs.value_latents(value)
    coded_value = value.float() if latents is None else codecs.decode_values(latents)
    exact_key, value_error = key.float().transpose(-1, -2), value.float() - coded_value
    by_group = query.float().unflatten(1, (n_kv_heads, -1)) * scaling  # [batch, kv heads, groups, n_tokens, head_dim]
    groups = by_group.shape[2]
    told = None if layer.simulation.watch is None else layer.simulation.watch(codecs, latents, value)
    place = torch.arange(n_tokens, device=query.device)
    encoded = (place - recent).clamp_min(0) // block * block  # how many tokens are encoded when a query comes
    at_once = _scored_at_once(query)

    def piece(start: int) -> tuple[Tensor, Tensor | None]:
        stop = min(start + at_once, n_tokens)
        rows = by_group[:, :, :, start:stop].flatten(2, 3)
        # Only the sinks and the keys that are recent for one of these queries can be exact: few columns.
        first = max(0, start - recent) // block * block  # encoded[start], which a GPU need not be asked for
        near = torch.cat([place[:stop][:sinks], place[max(sinks, first) : stop]])
        exact = (near < sinks) | (near >= encoded[start:stop, None])
        exact = exact.repeat(groups, 1)  # [groups * n_queries, n_near]
        scores = rows @ coded_key[..., :stop]
        scores[..., near] = torch.where(exact, rows @ exact_key[..., near], scores[..., near])
        scores = capped(scores, softcap)
        if mask is None:
            _hide_later(scores, stop - start)
        else:
            visible = additive_mask(mask[:, :, start:stop], batch, stop - start, stop, query.device)
            scores = scores + by_row(visible, n_kv_heads, groups)
        if s_aux is not None:
            aside = s_aux.float().view(1, n_kv_heads, groups, 1).expand(batch, -1, -1, stop - start)
            scores = torch.cat([scores, aside.flatten(2).unsqueeze(-1)], -1)
        weights = scores.softmax(-1)[..., :stop]
        chunk = weights @ coded_value[:, :, :stop] + (weights[..., near] * exact) @ value_error[:, :, near]
        seen = None if told is None else weights.index_copy(-1, near, weights[..., near] * ~exact)
        return chunk.unflatten(2, (-1, stop - start)), seen

    outputs, starts = [], range(0, n_tokens, at_once)
    for output, seen in map(piece, starts) if query.is_cuda else side_by_side(piece, starts, width=1):
        outputs.append(output)
        if told is not None and seen is not None:  # in their order, so that what is added up is the same every time
            told(seen)
    return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


def _scored_at_once(query: Tensor) -> int:
    if query.is_cuda:
        return _OF_SHORT_TEXTS if query.shape[2] <= _SHORT else _ON_A_GPU
    return _ON_A_CPU


def _hide_later(scores: Tensor, n_queries: int) -> None:
    """Put -inf into scores [batch, kv heads, groups * n_queries, n] where a key, one of the last, is a later token."""
    later = torch.ones(n_queries, n_queries, dtype=torch.bool, device=scores.device).triu(1)
    scores.unflatten(2, (-1, n_queries))[..., -n_queries:].masked_fill_(later, float("-inf"))


def additive_mask(mask: Tensor | None, batch: int, n_queries: int, n_tokens: int, device: torch.device) -> Tensor:
    """Return a float32 mask [batch, 1 or heads, n_queries, n_tokens]: 0 where a query may look, -inf where not."""
    if mask is None:
        return torch.zeros(batch, 1, n_queries, n_tokens, device=device)
    mask = mask[..., :n_tokens].expand(batch, -1, n_queries, n_tokens)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    mask = mask.float()
    return mask.masked_fill(mask <= torch.finfo(torch.float16).min, float("-inf"))


def by_row(mask: Tensor, n_kv_heads: int, groups: int) -> Tensor:
    """mask: [batch, 1 or heads, n_queries, n] -> [batch, 1 or kv heads, groups * n_queries, n], as queries are."""
    if mask.shape[1] == 1:
        return mask.repeat(1, 1, groups, 1)
    return mask.unflatten(1, (n_kv_heads, groups)).flatten(2, 3)
