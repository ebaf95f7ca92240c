"""What every policy must satisfy, and what each of them promises."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcompress.errors import BudgetError, OptionError
from kvcompress.model.model_spec import PARTS, Site
from kvcompress.options import POLICY_NAMES
from kvcompress.policies import POLICIES, Middle, Policy, SiteCurve
from kvcompress.policies.base import tail_energy


def curve(index: int, energy: list[float], numbers: int | list[int] = 1) -> SiteCurve:
    """The curve of site number `index`: keys and values of layer 0, then of layer 1, and so on."""
    cost = [numbers] * len(energy) if isinstance(numbers, int) else numbers
    site = Site(index // 2, PARTS[index % 2])
    return SiteCurve(site, torch.tensor(energy, dtype=torch.float64), torch.tensor(cost))


def spent(curves: list[SiteCurve], kept: list[int]) -> int:
    return sum(int(c.numbers[:r].sum()) for c, r in zip(curves, kept, strict=True))


def unpaid(curves: list[SiteCurve], kept: list[int]) -> float:
    return sum(float(c.energy[r:].sum()) for c, r in zip(curves, kept, strict=True))


ENERGIES = st.floats(0, 1e6, allow_nan=False)


@st.composite
def problems(draw: st.DrawFn, energies: st.SearchStrategy[float] = ENERGIES) -> tuple[list[SiteCurve], int]:
    """Several curves of any energies and costs, and a budget up to everything."""
    curves = []
    for i in range(2 * draw(st.integers(1, 4))):
        energy = draw(st.lists(energies, min_size=1, max_size=6))
        cost = draw(st.lists(st.integers(1, 16), min_size=len(energy), max_size=len(energy)))
        curves.append(curve(i, energy, cost))
    return curves, draw(st.integers(0, sum(c.width for c in curves)))


@st.composite
def unit_problems(draw: st.DrawFn) -> tuple[list[SiteCurve], int]:
    """Few curves of falling energies and unit costs: small enough to try everything."""
    curves = [
        curve(i, sorted(draw(st.lists(st.floats(0, 100), min_size=1, max_size=4)), reverse=True))
        for i in range(draw(st.integers(1, 4)))
    ]
    return curves, draw(st.integers(0, sum(c.width for c in curves)))


def make(name: str) -> Policy:
    return Middle("0:2") if name == "middle" else POLICIES[name]()


def check_allocation(policy: Policy, curves: list[SiteCurve], budget: int) -> None:
    try:
        kept = policy.allocate(curves, budget)
    except BudgetError:
        assert policy.name == "middle"
        return
    assert len(kept) == len(curves)
    assert all(0 <= r <= len(c.energy) for c, r in zip(curves, kept, strict=True))
    assert spent(curves, kept) <= budget


def test_registry_and_options_name_the_same_policies() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    assert all(policy.name == name for name, policy in POLICIES.items())


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(problem=problems())
def test_never_exceeds_the_budget(name: str, problem: tuple[list[SiteCurve], int]) -> None:
    check_allocation(make(name), *problem)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(problem=problems(st.floats(-10, 100)))
def test_negative_energies_do_not_break_the_budget(name: str, problem: tuple[list[SiteCurve], int]) -> None:
    """The greedy merging of `share` can find that sharing more loses less."""
    check_allocation(make(name), *problem)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(problem=problems())
def test_the_whole_budget_keeps_everything(name: str, problem: tuple[list[SiteCurve], int]) -> None:
    curves, _ = problem
    policy = Middle("0:99") if name == "middle" else POLICIES[name]()
    kept = policy.allocate(curves, sum(c.width for c in curves))
    worthless = [float(c.energy[r:].abs().sum()) for c, r in zip(curves, kept, strict=True)]
    if name == "energy":  # leaves out what has no energy
        assert sum(worthless) <= 1e-12 * sum(float(c.energy.sum()) for c in curves)
    else:
        assert kept == [len(c.energy) for c in curves]


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(problem=problems())
def test_same_input_same_allocation(name: str, problem: tuple[list[SiteCurve], int]) -> None:
    try:
        first = make(name).allocate(*problem)
    except BudgetError:
        return
    assert make(name).allocate(*problem) == first


@given(problem=unit_problems())
def test_loss_is_optimal(problem: tuple[list[SiteCurve], int]) -> None:
    """Against every allocation that fits, for falling energies and unit costs."""
    curves, budget = problem
    choices = product(*(range(len(c.energy) + 1) for c in curves))
    best = min(unpaid(curves, list(kept)) for kept in choices if sum(kept) <= budget)
    assert unpaid(curves, POLICIES["loss"]().allocate(curves, budget)) == pytest.approx(best)


@given(problem=problems())
def test_loss_leaves_no_room_for_another_item(problem: tuple[list[SiteCurve], int]) -> None:
    """Of curves with falling energies per number, nothing that still fits is left behind."""
    curves, budget = problem
    falling = [
        curve(i, (c.energy.sort(descending=True).values * c.numbers).tolist(), c.numbers.tolist())
        for i, c in enumerate(curves)
    ]
    assume(all((c.energy > 0).all() for c in falling))
    kept = POLICIES["loss"]().allocate(falling, budget)
    left = budget - spent(falling, kept)
    stopped = [c.numbers[r].item() for c, r in zip(falling, kept, strict=True) if r < len(c.energy)]
    assert all(cost > left for cost in stopped)


def test_loss_looks_past_a_weak_item() -> None:
    """One expensive step behind a cheap one: together they are worth more per number than the other site."""
    curves = [curve(0, [0.0, 10.0]), curve(1, [3.0, 3.0])]
    assert POLICIES["loss"]().allocate(curves, 2) == [2, 0]


def test_loss_trades_heads_of_different_sizes() -> None:
    """Per number, not per item: a head of 8 for 6 nats is worse than four numbers for 4."""
    curves = [curve(0, [6.0], 8), curve(1, [1.0] * 8)]
    assert POLICIES["loss"]().allocate(curves, 8) == [0, 8]


@given(problem=unit_problems())
def test_loss_is_never_worse_than_uniform(problem: tuple[list[SiteCurve], int]) -> None:
    curves, budget = problem
    ours, uniform = (unpaid(curves, POLICIES[name]().allocate(curves, budget)) for name in ("loss", "uniform"))
    assert ours <= uniform + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.3, 1.0])
def test_uniform_keeps_the_same_share(share: float) -> None:
    curves = [curve(i, [1.0] * n) for i, n in enumerate((8, 16, 8, 32))]
    kept = POLICIES["uniform"]().allocate(curves, int(share * 64))
    assert kept == [int(int(share * 64) / 64 * n) for n in (8, 16, 8, 32)]


def test_uniform_does_not_look_at_energies() -> None:
    first, second = ([curve(i, e) for i in range(2)] for e in ([9.0, 1.0], [0.1, 7.0]))
    assert POLICIES["uniform"]().allocate(first, 2) == POLICIES["uniform"]().allocate(second, 2) == [1, 1]


@pytest.mark.parametrize(
    ("preset", "n_layers", "chosen"),
    [
        ("half", 4, range(1, 3)),
        ("half", 30, range(7, 22)),
        ("half", 32, range(8, 24)),
        ("half", 5, range(1, 3)),
        ("deep", 32, range(3, 32)),
        ("deep", 5, range(3, 5)),
        ("8:24", 32, range(8, 24)),
        ("8:240", 32, range(8, 32)),
    ],
)
def test_middle_presets(preset: str, n_layers: int, chosen: range) -> None:
    assert Middle(preset).layer_range(n_layers) == chosen


@given(preset=st.sampled_from(["half", "deep", "1:3"]), keep=st.floats(0.05, 1))
def test_middle_leaves_the_other_layers_whole(preset: str, keep: float) -> None:
    curves = [curve(i, [1.0] * 8) for i in range(16)]
    budget = int(keep * 128)
    chosen = Middle(preset).layer_range(8)
    try:
        kept = Middle(preset).allocate(curves, budget)
    except BudgetError as error:
        assert budget < 16 * (8 - len(chosen))
        assert f"keep cannot go below {1 - len(chosen) / 8:.3f}" in str(error)
        return
    assert all(r == 8 for c, r in zip(curves, kept, strict=True) if c.site.layer not in chosen)
    assert len({r for c, r in zip(curves, kept, strict=True) if c.site.layer in chosen}) == 1


@pytest.mark.parametrize("layers", ["", "third", "5", "3:3", "4:2", "-1:4", "a:b", "1:2:3", "1.0:2"])
def test_middle_refuses_what_is_no_range(layers: str) -> None:
    with pytest.raises(OptionError, match="START:STOP"):
        Middle(layers)


def test_middle_of_layers_that_do_not_exist() -> None:
    curves = [curve(i, [1.0] * 8) for i in range(4)]
    with pytest.raises(BudgetError, match="layers '5:9'"):
        Middle("5:9").allocate(curves, 16)


@given(powers=st.lists(st.integers(-20, 20), min_size=2, max_size=4), keep=st.floats(0.1, 0.9))
def test_energy_gives_up_equal_shares(powers: list[int], keep: float) -> None:
    """Sites of one shape keep the same rank whatever their scale: the share of a site's own energy counts."""
    curves = [curve(i, [2.0 ** (p - k) for k in range(8)]) for i, p in enumerate(powers)]
    kept = POLICIES["energy"]().allocate(curves, int(keep * 8 * len(curves)))
    assert len(set(kept)) == 1


@given(problem=problems(st.floats(0.001, 1e6)))
def test_energy_is_tight(problem: tuple[list[SiteCurve], int]) -> None:
    """The common share is the smallest that fits: giving up any less exceeds the budget."""
    curves, budget = problem
    kept = POLICIES["energy"]().allocate(curves, budget)
    tails = [tail_energy(c.energy) / c.energy.sum() for c in curves]
    given_up = max(float(t[r]) for t, r in zip(tails, kept, strict=True))
    tighter = [int((t >= given_up * (1 - 1e-9)).sum()) for t in tails]
    assert given_up == 0 or spent(curves, tighter) > budget


def test_tail_energy() -> None:
    tail = tail_energy(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    assert tail.tolist() == [7.0, 3.0, 1.0, 0.0]
