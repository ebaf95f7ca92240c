"""Grouped folding: KV heads share virtual heads in groups of equal size, the plan that stock engines run.

Keys of a group are mixed with one complex matrix for each RoPE frequency (as `frequency`), values freely (as
`latent`); both sites of a layer have the same groups, because an engine pairs its i-th key head with its i-th value
head. Which heads form a group is searched: the partition whose predicted loss, keys and values together, is smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise

import torch
from torch import Tensor

from kvcompress.bases import Components, FittedBasis
from kvcompress.bases.base import expected_loss
from kvcompress.bases.frequency import Frequency
from kvcompress.calibration.moments import Moments
from kvcompress.choose.allocation import Choice, make_policy
from kvcompress.choose.fitting import FittedSite
from kvcompress.errors import BudgetError, OptionError
from kvcompress.model import blocks
from kvcompress.model.model_spec import DTYPE_BYTES, PARTS, AttentionSpec, ModelSpec, Part, Site
from kvcompress.options import GROUPED, CompressOptions
from kvcompress.policies import SiteCurve
from kvcompress.whitening import whitened_eigenbasis

#: Up to this many KV heads every partition is looked at; beyond it, swaps improve the partition into neighbours.
_EXHAUSTIVE_HEADS = 12
#: Nats that keep every layer's first group ahead of all else: no engine has a layer without a cached head.
_NEVER_NOTHING = 1e9
Group = tuple[int, ...]


class GroupedHeads(FittedBasis):
    """One grouping of a site; `components` ignores how many items are asked for, since the policy chose already."""

    def __init__(self, components: Components, head_dim: int) -> None:
        self.energy = torch.zeros(len(components.block) // head_dim, dtype=torch.float64)
        self.numbers = torch.full((len(self.energy),), head_dim)
        self._components = components

    def components(self, n_items: int) -> Components:
        return self._components


@dataclass(frozen=True)
class _LayerMoments:
    """A layer's C and F over all numbers of a site, float64 [n, n]; `metric` is what the fit takes for F."""

    attention: AttentionSpec
    covariance: dict[Part, Tensor]
    fisher: dict[Part, Tensor]
    metric: dict[Part, Tensor]

    @classmethod
    def of(cls, attention: AttentionSpec, moments: Moments, options: CompressOptions) -> _LayerMoments:
        everything = torch.arange(attention.width)[None]
        sites = {part: moments.sites[Site(attention.layer, part)] for part in PARTS}
        fisher = {part: m.fisher_information(everything)[0] for part, m in sites.items()}
        identity = torch.eye(attention.width, dtype=torch.float64)
        metric = dict.fromkeys(PARTS, identity) if options.metric == "activation" else fisher
        covariance = {part: m.covariance(everything, centred=False)[0] for part, m in sites.items()}
        return cls(attention, covariance, fisher, metric)

    def fit(self, part: Part, heads: Group, n_virtual: int) -> tuple[Tensor, Components]:
        """Return a group's blocks [n_blocks, width], in numbers of the site, and its components."""
        head_dim = self.attention.head_dim
        local = replace(self.attention, n_kv_heads=len(heads))
        numbers = head_numbers(heads, head_dim)
        wanted = numbers[blocks.frequencies(local) if part == "key" else torch.arange(len(numbers))[None]]
        rows, columns = wanted.unsqueeze(2), wanted.unsqueeze(1)
        covariance, metric = self.covariance[part][rows, columns], self.metric[part][rows, columns]
        if part == "key":
            return wanted, Frequency(whole_heads=True).fit(covariance, metric).components(n_virtual)
        _, encoder, decoder = whitened_eigenbasis(covariance, metric)
        rank = n_virtual * head_dim
        return wanted, Components(encoder[0, :rank], decoder[0, :, :rank].T, torch.zeros(rank, dtype=torch.long))

    def group_loss(self, heads: Group, n_virtual: int) -> float:
        """Return the predicted loss of one group by itself, keys and values, in nats a token."""
        numbers = head_numbers(heads, self.attention.head_dim)
        place = torch.empty(self.attention.width, dtype=torch.long)
        place[numbers] = torch.arange(len(numbers))
        loss = 0.0
        for part in PARTS:
            wanted, components = self.fit(part, heads, n_virtual)
            columns = place[wanted][components.block]  # [n_components, block width]
            wide = torch.zeros(2, len(columns), len(numbers), dtype=torch.float64)
            wide[0].scatter_(1, columns, components.encoder)
            wide[1].scatter_(1, columns, components.decoder)
            dense = Components(wide[0], wide[1], torch.zeros(len(columns), dtype=torch.long))
            covariance, fisher = (m[part][numbers][:, numbers][None] for m in (self.covariance, self.fisher))
            loss += expected_loss(covariance, fisher, dense)
        return loss

    def whole_loss(self, part: Part) -> float:
        """Return the predicted loss of keeping nothing."""
        return 0.5 * float((self.covariance[part] * self.fisher[part]).sum())


def choose_groups(
    spec: ModelSpec,
    moments: Moments,
    options: CompressOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[Site, FittedSite], dict[Site, Choice]]:
    """Return, for every site, the grouping that the policy pays for: the fit, and what it keeps.

    Both sites of a layer have the same groups of heads, each keeping `options.per_group` virtual heads; together
    they cache at most the budget, and at least one group in every layer. Raises OptionError where the heads cannot be
    split so, BudgetError where the budget is too small.
    """
    layers, curves = [], []
    for attention in spec.layers:
        levels = _fit_levels(_LayerMoments.of(attention, moments, options), options.per_group)
        energy = torch.stack([levels[0][part].energy for part in PARTS]).sum(0)
        energy[0] += _NEVER_NOTHING
        numbers = torch.tensor([0, *(2 * len(level["key"].basis.energy) for level in levels)]).diff()
        curves.append(SiteCurve(Site(attention.layer, "key"), energy, numbers * attention.head_dim))
        layers.append(levels)
        if progress:
            progress("fit", attention.layer + 1, len(spec.layers))
    budget = int(options.keep * spec.cache_numbers_per_token + 1e-9)
    kept = make_policy(options).allocate(curves, budget)
    if not all(kept):
        least = sum(int(c.numbers[0]) for c in curves) / spec.cache_numbers_per_token
        raise BudgetError(
            f"keep {options.keep} leaves a layer without a cached head; these groups need at least {least:.3g} in all. "
            "Raise --keep."
        )
    fitted: dict[Site, FittedSite] = {}
    chosen: dict[Site, Choice] = {}
    for attention, levels, n_items in zip(spec.layers, layers, kept, strict=True):
        for part in PARTS:
            site, fit = Site(attention.layer, part), levels[n_items - 1][part]
            fitted[site], chosen[site] = fit, _choice(spec, fit)
    return fitted, chosen


def _choice(spec: ModelSpec, fit: FittedSite) -> Choice:
    components = fit.basis.components(0)
    rank = len(components.block)
    loss = 0.0 if rank == fit.blocks.numel() else fit.loss(components)
    bits = torch.full((rank,), 8 * DTYPE_BYTES[spec.dtype], dtype=torch.uint8)
    return Choice(components, bits, torch.ones(rank), loss)


def group_sizes(n_kv_heads: int, n_virtual: int) -> list[int]:
    """Return the sizes of groups that keep `n_virtual` heads each, largest first; with the last one nothing is lost.

    Raises OptionError if there are none.
    """
    if n_kv_heads % n_virtual:
        raise OptionError(
            f"{n_kv_heads} KV heads cannot be split into groups that keep {n_virtual} virtual heads each. "
            "Choose another --per-group, or --key-basis frequency (one group of all heads)."
        )
    return [g for g in range(n_kv_heads, n_virtual - 1, -1) if n_kv_heads % g == 0]


def head_numbers(heads: Sequence[int], head_dim: int) -> Tensor:
    """Return the numbers of a site that belong to some heads: [len(heads) * head_dim]."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def best_partition(n_heads: int, size: int, loss: Callable[[Group], float]) -> list[Group]:
    """Return the partition of range(n_heads) into groups of `size` heads with the smallest sum of losses.

    The best of all for few heads; for more, one that no swap of two heads makes better.
    """
    loss = cache(loss)
    if n_heads <= _EXHAUSTIVE_HEADS:

        @cache
        def best(left: Group) -> tuple[float, tuple[Group, ...]]:
            if not left:
                return 0.0, ()
            answers = []
            for others in combinations(left[1:], size - 1):
                group = (left[0], *others)
                rest, groups = best(tuple(h for h in left if h not in group))
                answers.append((rest + loss(group), (group, *groups)))
            return min(answers)

        return list(best(tuple(range(n_heads)))[1])
    groups = [tuple(range(i, i + size)) for i in range(0, n_heads, size)]
    while (better := _best_swap(groups, loss)) is not None:
        groups = better
    return sorted(groups)


def _best_swap(groups: list[Group], loss: Callable[[Group], float]) -> list[Group] | None:
    """Return the partition after the swap of two heads that saves most, or None if none saves anything."""
    best, result = -1e-12, None
    for i, j in combinations(range(len(groups)), 2):
        for a in groups[i]:
            for b in groups[j]:
                left = tuple(sorted({*groups[i], b} - {a}))
                right = tuple(sorted({*groups[j], a} - {b}))
                change = loss(left) + loss(right) - loss(groups[i]) - loss(groups[j])
                if change < best:
                    best = change
                    result = [left if k == i else right if k == j else g for k, g in enumerate(groups)]
    return result


def _fit_levels(layer: _LayerMoments, n_virtual: int) -> list[dict[Part, FittedSite]]:
    """Return the fits of a layer for every group size, coarsest first; each carries the energies of all levels."""
    attention = layer.attention
    sizes = group_sizes(attention.n_kv_heads, n_virtual)
    levels, losses = [], {part: [layer.whole_loss(part)] for part in PARTS}
    for size in sizes[:-1]:
        groups = best_partition(attention.n_kv_heads, size, lambda g: layer.group_loss(g, n_virtual))
        level = {part: _fit_level(layer, part, groups, n_virtual) for part in PARTS}
        for part, fit in level.items():
            losses[part].append(min(losses[part][-1], fit.loss(fit.basis.components(0))))
        levels.append(level)
    everything = torch.arange(attention.width)[None]
    whole = GroupedHeads(_identity(attention.width), attention.head_dim)
    levels.append({p: _fitted_site(layer, p, everything, whole) for p in PARTS})
    energies = {p: torch.tensor([a - b for a, b in pairwise([*values, 0.0])]) for p, values in losses.items()}
    return [{p: replace(fit, energy=energies[p].double()) for p, fit in level.items()} for level in levels]


def _fit_level(layer: _LayerMoments, part: Part, groups: list[Group], n_virtual: int) -> FittedSite:
    """Return a site fitted to these groups, virtual heads in the order of the groups."""
    fits = [layer.fit(part, group, n_virtual) for group in groups]
    first_block = len(fits[0][0])
    components = Components(
        torch.cat([c.encoder for _, c in fits]),
        torch.cat([c.decoder for _, c in fits]),
        torch.cat([c.block + i * first_block for i, (_, c) in enumerate(fits)]),
    )
    wanted = torch.cat([b for b, _ in fits])
    return _fitted_site(layer, part, wanted, GroupedHeads(components, layer.attention.head_dim))


def _fitted_site(layer: _LayerMoments, part: Part, wanted: Tensor, basis: GroupedHeads) -> FittedSite:
    order = wanted.flatten()  # every number of the layer once, block after block
    moments = (m[order][:, order][None] for m in (layer.covariance[part], layer.fisher[part]))
    inner = torch.arange(len(wanted))[None]
    return FittedSite(GROUPED, basis, wanted, basis.energy, False, part == "key", inner, *moments)


def _identity(rank: int) -> Components:
    """Return components that stand for a site kept whole, which needs no maps."""
    nothing = torch.zeros(rank, 0, dtype=torch.float64)
    return Components(nothing, nothing, torch.zeros(rank, dtype=torch.long))
