"""The proof that a model turns its keys by a rotation, from what it was seen to cache at several positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import UnsupportedModelError
from kvcompress.model.model_spec import Site
from kvcompress.model.rotation import Rotation, channel_pairs

#: Relative error within which two tensors are equal, for float32 and for 16-bit models.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class FrequencyTable:
    """Frequencies as a model keeps them ([n], float32), and the attention factor that comes with them."""

    frequencies: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Keys:
    """What reached the cache from texts of one token: `at[p]` at position p, `base` at position 0, by layer."""

    base: dict[int, Any]
    at: dict[int, dict[int, Any]]


def prove_rotation(keys: Keys, layer: int, part: str, *, candidates: list[FrequencyTable]) -> Rotation | None:
    """Return the rotation of a site as the model applies it, or None where it does not turn.

    candidates: frequencies that the model holds; where none of them fits, they are measured. Raises
    UnsupportedModelError where the numbers change with the position, their tokens' hidden states do not, and no
    rotation explains it.
    """
    base = _rows(keys.base[layer], part)
    moved = {p: _rows(updates[layer], part) for p, updates in keys.at.items()}
    tolerance = _TOLERANCE.get(getattr(keys.base[layer], part).dtype, 4e-2)
    channels = _turning(base, moved, tolerance)
    if not channels:
        return None
    other = "value" if part == "key" else "key"
    if _changes_everywhere(keys, layer, other, tolerance) and _norms_change(base, moved, tolerance):
        return None  # positions are part of the hidden states (learned): nothing is rotated
    layouts = [
        (start, interleaved, torch.tensor(channel_pairs(width, start, interleaved)))
        for width, start in _ranges(channels, base.shape[1])
        for interleaved in (False, True)
    ]
    for own in (True, False):  # the model's own first: of interleaved pairs those that turn slowly may not be seen to
        for start, interleaved, pairs in layouts:
            tables = (c for c in candidates if len(c.frequencies) == len(pairs))
            for table in tables if own else _measured(base, moved, pairs):
                if _explains(base, moved, pairs, table.frequencies, tolerance):
                    return Rotation(tuple(table.frequencies.tolist()), start, interleaved, table.scale)
    raise UnsupportedModelError(
        f"layer {layer}: {part}s change with the position of their token and no rotation explains it, so cached ones "
        "cannot be un-rotated. RoPE that changes with the length of the text (dynamic, longrope) is not supported."
    )


def is_turned_by(keys: Keys, site: Site, rotation: Rotation | None) -> bool:
    """Return whether a rotation explains what was seen of a site; None: its numbers do not turn."""
    base = _rows(keys.base[site.layer], site.part)
    moved = {p: _rows(updates[site.layer], site.part) for p, updates in keys.at.items()}
    tolerance = 4 * _TOLERANCE.get(getattr(keys.base[site.layer], site.part).dtype, 4e-2)
    if rotation is None:
        return all(_error(base, x) <= tolerance for x in moved.values()) or _norms_change(base, moved, tolerance / 4)
    return _explains(base, moved, torch.tensor(rotation.pairs()), torch.tensor(rotation.frequencies), tolerance)


def _rows(update: Any, part: str) -> Tensor:
    """Return a site's numbers as rows of one head each: [tokens * heads, head_dim], float64."""
    x: Tensor = getattr(update, part)
    return x.detach().double().cpu().flatten(0, 2)


def _turning(base: Tensor, moved: dict[int, Tensor], tolerance: float) -> list[int]:
    """Return the channels whose numbers change with the position."""
    size = base.norm(dim=0).clamp_min(1e-12)
    turns = torch.zeros(base.shape[1], dtype=torch.bool)
    for x in moved.values():
        turns |= (base - x).norm(dim=0) / size > tolerance
    found: list[int] = turns.nonzero()[:, 0].tolist()
    return found


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


def _changes_everywhere(keys: Keys, layer: int, part: str, tolerance: float) -> bool:
    base = _rows(keys.base[layer], part)
    return all(_error(base, _rows(at[layer], part)) > tolerance for at in keys.at.values())


def _norms_change(base: Tensor, moved: dict[int, Tensor], tolerance: float) -> bool:
    """Return whether rows change their length: a rotation never does that."""
    return any(_error(base.norm(dim=1), x.norm(dim=1)) > tolerance for x in moved.values())


def _ranges(channels: list[int], head_dim: int) -> list[tuple[int, int]]:
    """Return the (width, start) that the turning channels may be a part of, the closest first.

    The slowest pairs may turn too little to be seen, so a range may be wider than what was seen to change.
    """
    first, last = channels[0], channels[-1]
    found = [(last + 1 - first, first), (last + 1, 0), (head_dim - first, first), (head_dim, 0)]
    found += [(width, 0) for width in range(2, head_dim, 2) if width > last]
    even = [(w, s) for w, s in found if w % 2 == 0]
    return sorted(set(even), key=even.index)


def _turned(base: Tensor, pairs: Tensor, angles: Tensor) -> Tensor:
    x, y = base[:, pairs[:, 0]], base[:, pairs[:, 1]]
    out = base.clone()
    out[:, pairs[:, 0]] = x * angles.cos() - y * angles.sin()
    out[:, pairs[:, 1]] = y * angles.cos() + x * angles.sin()
    return out


def _explains(base: Tensor, moved: dict[int, Tensor], pairs: Tensor, frequencies: Tensor, tolerance: float) -> bool:
    """Return whether turning by these frequencies gives what was seen, at every position and for every pair."""
    turned = set(pairs.flatten().tolist())
    rest = [c for c in range(base.shape[1]) if c not in turned]
    for position, seen in moved.items():
        # float32, as models compute their angles: at position 60,000 that is 4e-3 radians away from the exact one
        angles = (torch.tensor(float(position)) * frequencies.float()).double()
        error = _turned(base, pairs, angles) - seen
        size = base.square().sum(0)
        by_pair = error.square().sum(0)[pairs].sum(1) / size[pairs].sum(1).clamp_min(1e-20)
        if bool((by_pair.sqrt() > tolerance).any()) or (rest and _error(base[:, rest], seen[:, rest]) > tolerance):
            return False
    return True


def _measured(base: Tensor, moved: dict[int, Tensor], pairs: Tensor) -> Iterator[FrequencyTable]:
    """Yield the frequencies that keys are seen to turn by, first roughly, then to the precision of far positions.

    Nothing where position 1 was not seen.
    """
    if 1 not in moved:
        return
    frequencies = _angle(base, moved[1], pairs)
    for position in sorted(p for p in moved if p > 1):
        angle = _angle(base, moved[position], pairs)
        whole = ((frequencies * position - angle) / (2 * math.pi)).round()
        frequencies = (angle + 2 * math.pi * whole) / position
    yield FrequencyTable(frequencies)


def _angle(base: Tensor, seen: Tensor, pairs: Tensor) -> Tensor:
    """Return the angle between each pair's numbers and those seen, over all rows: [n_pairs]."""
    x, y = (base[:, pairs[:, i]] for i in (0, 1))
    u, v = (seen[:, pairs[:, i]] for i in (0, 1))
    return torch.atan2((x * v - y * u).sum(0), (x * u + y * v).sum(0))
