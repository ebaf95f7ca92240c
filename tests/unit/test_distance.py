"""How far a text is from what was calibrated on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.distance import Distance, distance_of, seen_of_samples, watched
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan


@pytest.fixture(scope="module")
def coded(tiny_checkpoint: Any, tiny_moments: Any) -> Any:
    """(codec, samples without their mean) of every value site of a tiny model, and its plan."""
    from kvcompress.checkpoint.reader import open_checkpoint

    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = tiny_moments("llama-gqa")
        plan, maps, _ = make_plan(checkpoint, moments, CompressOptions(keep=0.2, policy="uniform"))
    sites = [(SiteCodec(m, torch.device("cpu")), moments.sites[s].samples - m.mean) for s, m in maps.items()]
    return plan, sites


def of_samples(sites: list[tuple[SiteCodec, torch.Tensor]]) -> Distance:
    found = distance_of([watch for codec, samples in sites for watch in seen_of_samples(codec, samples)])
    assert found is not None
    return found


def test_the_calibration_text_is_near_itself(coded: Any) -> None:
    plan, sites = coded
    own = of_samples(sites)
    assert own.component_energy == pytest.approx(1, abs=0.25)  # of tokens as they come; steps suit weighed ones
    assert plan.calibration["typical"]["component_energy"] == pytest.approx(1, abs=0.25)
    assert plan.calibration["typical"]["gains_at_ends"] == pytest.approx(own.gains_at_ends, abs=0.1)
    assert not own.is_far(Distance(**plan.calibration["typical"]))


def test_larger_components_are_far(coded: Any) -> None:
    """Twice as large: four times the energy. Twenty times: the gains are at their end as well."""
    _, sites = coded
    own = of_samples(sites)
    twice, more = (of_samples([(c, k * x) for c, x in sites]) for k in (2, 20))
    assert twice.component_energy == pytest.approx(4 * own.component_energy, rel=1e-3)
    assert twice.is_far(own) and more.is_far(own)
    assert more.gains_at_ends > 0.9 > own.gains_at_ends


def test_gains_alone_can_tell(coded: Any) -> None:
    assert Distance(1.0, 0.3).is_far(Distance(1.0, 0.05)) and not Distance(1.3, 0.1).is_far(Distance(1.0, 0.05))


def test_sinks_are_not_counted_and_nothing_is_left_behind(coded: Any) -> None:
    codec, samples = coded[1][0]
    spoiled = samples[None].clone()
    spoiled[:, :3] *= 1e4
    with watched([None, codec], skipped=3) as watches:
        codec.encode(spoiled)
    assert codec.watch is None and len(watches) == 1
    assert distance_of(watches).component_energy == pytest.approx(1, abs=0.3)
    assert watches[0].n_tokens == len(samples) - 3


def test_nothing_seen_is_no_distance() -> None:
    assert distance_of([]) is None
