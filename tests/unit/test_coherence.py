"""Coherence: how errors of a window's tokens add up, and what that changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from kvcompress.calibration.coherence import Watch, measure_coherence
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan
from tests.tiny_models import random_ids

N_TOKENS, HEAD_DIM = 400, 8


def site_of(x: torch.Tensor, g: torch.Tensor) -> SiteMoments:
    sums = SiteMoments.empty([torch.arange(x.shape[1])[None]], x.shape[1])
    sums.add(x, g)
    return sums


def coherence_of(make: Any, n_windows: int = 4) -> torch.Tensor:
    """Return the coherence of one head whose windows are make(generator) = (x, g), calibrated on others like them."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.cat(parts) for parts in zip(*(make(generator) for _ in range(8)), strict=True))
    watch = Watch.of(site_of(x, g), torch.arange(HEAD_DIM)[None])
    for _ in range(n_windows):
        watch.add(*make(generator))
    return watch.by_rank()


def test_independent_tokens_have_none() -> None:
    def make(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(N_TOKENS, HEAD_DIM, generator=generator) for _ in range(2))

    assert coherence_of(make, 32).mean() == pytest.approx(1, abs=0.3)


def test_tokens_that_err_alike_add_up() -> None:
    """x and g of a window that are the same at every token: what dropping costs grows with the tokens' square."""

    def make(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(1, HEAD_DIM, generator=generator).expand(N_TOKENS, -1) for _ in range(2))

    assert coherence_of(make).min() == pytest.approx(N_TOKENS, rel=1e-3)


def test_it_is_that_of_the_gradients(tiny_checkpoint: Any, tiny_model: Any) -> None:
    """On a model, against sums over tokens taken from what the same pass adds; and it is kept in the file."""
    model = tiny_model("llama-gqa")
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        spec = checkpoint.spec
    moments = empty_moments(spec, {"mode": "fisher"}, group=spec.layers[0].n_kv_heads)
    from kvcompress.calibration.fisher import collect_moments

    ids = random_ids(8, 64)
    collect_moments(model, spec, ids, moments, sinks=2, recent=4, seed=0)
    assert moments.sites[Site(0, "key")].coherence is None
    done: list[tuple[int, int]] = []
    collect = partial(collect_moments, model)
    told = lambda *x: done.append(x)  # noqa: E731
    measure_coherence(spec, ids, moments, sinks=2, recent=4, seed=0, collect=collect, progress=told)
    assert done[-1] == (128, 128)  # two windows of the eight
    for sums in moments.sites.values():
        assert sums.coherence is not None and sums.coherence.shape == sums.total.shape
        assert (sums.coherence >= 1).all() and sums.coherence.isfinite().all()


def test_it_is_kept_in_the_file(tiny_moments: Any, tmp_path: Any) -> None:
    moments = tiny_moments("llama-gqa")
    site = Site(0, "value")
    sums = moments.sites[site]
    coherence = torch.linspace(3, 1, len(sums.total), dtype=torch.float64)
    changed = replace(moments, sites=moments.sites | {site: replace(sums, coherence=coherence)})
    changed.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert torch.equal(loaded.sites[site].coherence, coherence)
    assert loaded.sites[Site(0, "key")].coherence is None


def test_coherent_sites_drop_less(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    """Values whose errors add up keep more components, and more loss is predicted."""
    moments = tiny_moments("llama-gqa")
    sites = {
        site: replace(sums, coherence=torch.full_like(sums.total, 6.0 if site.part == "value" else 1.0))
        for site, sums in moments.sites.items()
    }
    options = CompressOptions(keep=0.12, sinks=2, recent=4)
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        alone, _, _ = make_plan(checkpoint, moments, options)
        coherent, _, _ = make_plan(checkpoint, replace(moments, sites=sites), options)
        squared = replace(options, metric="activation")
        same = [make_plan(checkpoint, m, squared)[0].sites for m in (moments, replace(moments, sites=sites))]

    def rank(plan: Any) -> int:
        return sum(s.rank for s in plan.sites if s.part == "value")

    assert rank(coherent) > rank(alone)
    assert coherent.predicted_loss > alone.predicted_loss
    assert same[0] == same[1]  # squared errors know no coherence
