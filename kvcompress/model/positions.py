"""Short texts at chosen positions: what they hand to the cache of a loaded model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.model.proof import Keys
from kvcompress.model.recording import Recorded, Update, recorded

#: Texts of one token each that the rotation is proven on.
_TOKENS = 64


def keys_at_positions(model: Any, *, at_once: bool = False, alike: bool = False) -> Keys:
    """Return what texts of one token hand to the cache at several positions.

    at_once: all positions in one forward, unless frequencies depend on the largest of them. alike: what attention gives
    at the first position is gone on with at all. It does not depend on where such a text is, but for rounding, by which
    experts' routers choose others in 16 bits, and every later layer is another one.
    """
    ids = tokens_of(model, (_TOKENS, 1))
    if not takes_positions(model):
        return Keys(forward(model, ids).updates, {})
    if at_once and not compat.turns_by_length(model):
        return _keys_at_once(model, ids, positions_of(model), alike=alike)
    attended = Attended()
    first, *others = positions_of(model)
    base = forward(model, ids, position=first, instead=attended.seen).updates
    again = attended.again if alike else lambda: None
    return Keys(base, {p: forward(model, ids, position=p, instead=again()).updates for p in others})


class Attended:
    """What attention gave in one forward, in the order of calls; `again()` has the next forward go on with the same."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []

    def seen(self, result: Tensor) -> Tensor:
        self._results.append(result)
        return result

    def again(self) -> Callable[[Tensor], Tensor]:
        left = iter(self._results)
        return lambda result: next(left, result)


def _keys_at_once(model: Any, ids: Tensor, positions: list[int], *, alike: bool) -> Keys:
    n = len(ids)
    given = torch.tensor(positions, device=ids.device).repeat_interleave(n)[:, None]

    def as_first(result: Tensor) -> Tensor:  # the first rows are those of position 0
        return result[:n].repeat(len(positions), *[1] * (result.dim() - 1))

    instead = as_first if alike else None
    updates = forward(model, ids.repeat(len(positions), 1), position=given, instead=instead).updates
    rows = {p: slice(n * k, n * (k + 1)) for k, p in enumerate(positions)}
    at = {p: {i: Update(u.key[r], u.value[r]) for i, u in updates.items()} for p, r in rows.items()}
    return Keys(at.pop(0), at)


def takes_positions(model: Any) -> bool:
    """Return whether positions can be given: of other models (ALiBi, ...) keys do not turn."""
    parameters = inspect.signature(type(model).forward).parameters
    decoder = inspect.signature(type(compat.decoder_of(model)).forward).parameters
    return "position_ids" in parameters and "position_ids" in decoder


def positions_of(model: Any) -> list[int]:
    """Return 0, small positions that pin frequencies down, and large ones, inside of what the model was made for."""
    most = getattr(compat.text_config(model), "max_position_embeddings", None) or 2048
    steps = [0, 1]
    while steps[-1] * 4 < min(most, 1 << 16):
        steps.append(steps[-1] * 4)
    return sorted({*steps, min(most, 1 << 16) - 1, min(most, 1 << 16) * 5 // 7})


def tokens_of(model: Any, shape: tuple[int, int]) -> Tensor:
    """Return seeded tokens of the model's vocabulary, on its device."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator)
    return ids.to(next(model.parameters()).device)


def forward(
    model: Any,
    ids: Tensor,
    position: int | Tensor | None = None,
    *,
    instead: Callable[[Tensor], Tensor] | None = None,
) -> Recorded:
    """Return what a forward of tokens [rows, n_tokens] hands to the cache.

    position: of every token, or one of each row [rows, 1]. instead: see recorded.
    """
    given: dict[str, Any] = {}
    if position is not None:
        given["position_ids"] = torch.full_like(ids, position) if isinstance(position, int) else position
    if not ids.is_meta:  # a mask is looked into
        given["attention_mask"] = torch.ones_like(ids)
    with recorded(model, instead) as run, torch.no_grad():
        given |= compat.cache_argument(model, run.cache)
        model(input_ids=ids, use_cache=True, **given)
    return run
