"""Which heads share virtual heads: the search, and what is fitted to the groups it finds."""

from __future__ import annotations

from copy import deepcopy
from itertools import permutations
from typing import Any

import pytest
import torch

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import BudgetError, OptionError
from kvcompress.fold.grouping import best_partition, choose_groups, group_sizes
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions


def seeded_loss(n_heads: int, seed: int = 0) -> Any:
    """A loss of groups that is no sum over pairs."""
    weights = torch.rand(n_heads, n_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda group: float(weights[list(group)][:, list(group)].sum() ** 1.5)


@pytest.mark.parametrize(("n_heads", "size"), [(4, 2), (6, 2), (6, 3), (8, 4), (4, 4), (4, 1)])
def test_few_heads_are_searched_exhaustively(n_heads: int, size: int) -> None:
    loss = seeded_loss(n_heads)
    every = {
        tuple(sorted(tuple(sorted(order[i : i + size])) for i in range(0, n_heads, size)))
        for order in permutations(range(n_heads))
    }
    found = best_partition(n_heads, size, loss)
    assert sorted(h for group in found for h in group) == list(range(n_heads))
    assert sum(map(loss, found)) == pytest.approx(min(sum(map(loss, groups)) for groups in every))


@pytest.mark.parametrize("size", [2, 4])
def test_many_heads_are_improved_by_swaps(size: int) -> None:
    """16 heads that belong together by residue: the only partition without loss is found from the neighbours'."""
    found = best_partition(16, size, lambda g: sum(abs(a % (16 // size) - b % (16 // size)) for a in g for b in g))
    assert found == [tuple(range(i, 16, 16 // size)) for i in range(16 // size)]


def test_group_sizes() -> None:
    assert group_sizes(8, 1) == [8, 4, 2, 1]
    assert group_sizes(8, 2) == [8, 4, 2]
    assert group_sizes(3, 1) == [3, 1]
    with pytest.raises(OptionError, match="3 KV heads cannot be split"):
        group_sizes(3, 2)


def test_duplicated_heads_are_found_and_cost_nothing(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    """Heads 0 and 2, 1 and 3 are made the same: pairing them loses nothing, any other pairing something."""
    moments = deepcopy(tiny_moments("llama-mha"))
    for sums in moments.sites.values():
        order = torch.arange(32).reshape(4, 8)[[0, 1, 0, 1]].flatten()
        sums.outer[0] = sums.outer[0][:, order][:, :, order].clone()
    options = CompressOptions(folded=True, key_basis="grouped", keep=0.5, policy="uniform")
    with open_checkpoint(tiny_checkpoint("llama-mha")) as checkpoint:
        spec = checkpoint.spec
    fitted, chosen = choose_groups(spec, moments, options)
    for layer in range(3):
        for part in ("key", "value"):
            fit, choice = fitted[Site(layer, part)], chosen[Site(layer, part)]  # type: ignore[index]
            whole = float((fit.covariance * fit.fisher).sum()) / 2
            assert choice.predicted_loss < 1e-6 * whole
            assert len(choice.components.block) == 16
            heads = {tuple(sorted(set((row // 8).tolist()))) for row in fit.blocks}
            assert heads == {(0, 2), (1, 3)}


def test_both_sites_of_a_layer_have_the_same_groups(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        spec = checkpoint.spec
    moments = tiny_moments("llama-gqa")
    for policy in ("loss", "uniform"):
        for keep in (0.5, 0.7, 1.0):
            options = CompressOptions(folded=True, key_basis="grouped", policy=policy, keep=keep)
            _, chosen = choose_groups(spec, moments, options)
            ranks = {site: len(choice.bits) for site, choice in chosen.items()}
            assert sum(ranks.values()) <= keep * spec.cache_numbers_per_token
            assert all(ranks[Site(i, "key")] == ranks[Site(i, "value")] for i in range(3))
            assert (sum(ranks.values()) == spec.cache_numbers_per_token) == (keep == 1.0)
            assert all(ranks.values())


def test_every_layer_keeps_a_head_or_it_is_told(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        for policy in ("loss", "uniform"):
            options = CompressOptions(folded=True, key_basis="grouped", policy=policy, keep=0.49)
            with pytest.raises(BudgetError, match=r"at least 0\.5 in all"):
                choose_groups(checkpoint.spec, tiny_moments("llama-gqa"), options)
