"""KQ-SVD and xKV: full rank is lossless, ranks are the best there are, bytes are those of storages; KVTC deflated."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import OptionError
from kvcompress.evaluate.deflate import deflated_nbytes
from kvcompress.evaluate.peer_kqsvd import collect_grams, factorised, kqsvd_plan, ranks_within
from kvcompress.evaluate.peer_run import decoded_states
from kvcompress.evaluate.peer_xkv import Xkv
from kvcompress.model.model_spec import Site
from kvcompress.model.probe import probe
from kvcompress.options import CompressOptions
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from tests.tiny_models import random_ids

SINKS, RECENT = 2, 32


def exact_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model.get_decoder()(input_ids=ids).last_hidden_state
    return states


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "phi3-partial"])
def test_xkv_of_full_rank_is_lossless_and_loss_grows_as_ranks_fall(tiny_model: Any, family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 150, seed=3)
    spec, exact = probe(model), exact_states(model, ids)
    errors = []
    for keep in (1.25, 0.8, 0.4):  # 1.25: four fifths of it for keys are all of their ranks
        peer = Xkv(keep, SINKS, RECENT)
        cache = peer.cache_for(model, spec, ids)
        errors.append(float((decoded_states(model, ids, peer, cache) - exact).norm() / exact.norm()))
        assert cache.nbytes() == 2 * peer.cache_bytes(spec, 150)
        assert peer.measured_bytes_per_token(spec) == peer.bytes_per_token(spec)
        bases = sum(t.nbytes for group in cache.groups for t in group.bases.values()) / 2  # of one of the two texts
        with_bases = peer.bytes_per_token(spec) + bases / 96  # tokens that are old: three blocks of 150 - 32
        assert peer.bytes_per_token_within(spec, 150) == pytest.approx(with_bases)
    assert errors[0] < 1e-4
    assert 100 * errors[0] < errors[1] < errors[2]


def test_xkv_decodes_in_chunks_what_it_decodes_token_by_token(tiny_model: Any) -> None:
    """A block leaves the window when the next forward begins, so every token of a block sees the same ones exactly."""
    model, ids = tiny_model("llama-gqa"), random_ids(1, 130, seed=4)
    spec, peer = probe(model), Xkv(0.5, SINKS, RECENT)
    ours = decoded_states(model, ids, peer, peer.cache_for(model, spec, ids))
    cache, states = peer.cache_for(model, spec, ids), []
    bounds = [0, *range(64, 131)]
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            output = model.get_decoder()(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            states.append(output.last_hidden_state)
    exact = exact_states(model, ids)
    assert (ours - torch.cat(states, 1)).abs().max() < 1e-3 * (exact - ours).abs().max()


def test_xkv_shares_one_latent_among_the_layers_of_a_group(tiny_model: Any) -> None:
    model, ids = tiny_model("llama-gqa"), random_ids(1, 128, seed=4)
    spec = probe(model)
    cache = Xkv(0.5, SINKS, RECENT, layers=2).cache_for(model, spec, ids)
    assert [len(g.layers) for g in cache.groups] == [2, 1]
    keys = cache.groups[0].bases["key"][0].float()
    assert keys.shape == (2 * spec.layers[0].width, int(0.4 * 2 * spec.layers[0].width))
    assert torch.allclose(keys.T @ keys, torch.eye(keys.shape[1]), atol=1e-4)
    with pytest.raises(OptionError, match="no rank"):
        Xkv(0.001, SINKS, RECENT).check(spec, 128)


def test_kqsvd_is_the_best_low_rank_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(1, n, 6, generator=generator, dtype=torch.float64) for n in (40, 70))
    queries = queries * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    found = factorised(keys.transpose(1, 2) @ keys, queries.transpose(1, 2) @ queries, 40)
    scores = keys[0] @ queries[0].T
    expected = torch.linalg.svdvals(scores)[:6]
    assert torch.allclose(found.spectrum[0], expected, rtol=1e-8)
    for rank in (1, 3, 6):
        seen = keys[0] @ found.down[0, :, :rank] @ found.up[0, :, :rank].T @ queries[0].T
        assert float((scores - seen).norm()) == pytest.approx(float(expected[rank:].norm()), rel=1e-6, abs=1e-9)
    stored = keys[0] @ found.down[0]
    assert torch.allclose(stored.square().mean(0), torch.ones(6, dtype=torch.float64))


def test_kqsvd_leaves_the_same_share_of_the_spectrum_everywhere() -> None:
    spectra = {Site(0, "key"): [8.0, 1, 0.5, 0.5], Site(0, "value"): [1.0, 1, 1, 1]}
    factors = {}
    for site, spectrum in spectra.items():
        whole = factorised(torch.eye(4)[None].double(), torch.tensor(spectrum).square().diag()[None].double(), 1)
        factors[site] = replace(whole, spectrum=torch.tensor([spectrum]).double())
    assert ranks_within(factors, 8) == {Site(0, "key"): 4, Site(0, "value"): 4}
    # leaving a fifth: key keeps 1 of 4 (0.2 is left), value all but none
    assert ranks_within(factors, 5) == {Site(0, "key"): 1, Site(0, "value"): 4}
    assert ranks_within(factors, 4) == {Site(0, "key"): 1, Site(0, "value"): 3}


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_kqsvd_runs_as_a_plan_and_full_rank_is_lossless(tiny_model: Any, tiny_checkpoint: Any, family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 96, seed=5)
    exact, errors = exact_states(model, ids), []
    grams = collect_grams(model, ids, sinks=0)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        for keep in (0.99, 0.75, 0.4):
            options = CompressOptions(keep=keep, sinks=0, recent=0)
            plan, maps = kqsvd_plan(checkpoint, model, grams, options)
            assert plan.keep <= keep
            attach_plan(model, plan, maps)
            with torch.no_grad(), attachment_of(model).simulated(sinks=0, recent=0):
                states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            detach(model)
            errors.append(float((states - exact).norm() / exact.norm()))
    assert errors[0] < errors[1] < errors[2]
    width = sum(s.width for s in plan.sites)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        plan, _ = kqsvd_plan(checkpoint, model, grams, CompressOptions(keep=1.0))
    assert sum(s.rank for s in plan.sites) == width and all(s.exact for s in plan.sites)


def test_deflated_bytes_are_fewer_where_codes_repeat_and_never_more(tiny_model: Any, tiny_checkpoint: Any) -> None:
    model = tiny_model("llama-gqa")
    grams = collect_grams(model, random_ids(2, 96, seed=5), sinks=0)
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        plan, maps = kqsvd_plan(checkpoint, model, grams, CompressOptions(keep=0.5, sinks=0, recent=0))
    attach_plan(model, plan, maps)
    sizes = {}
    for name, ids in (("random", random_ids(1, 256, seed=1)), ("same", torch.full((1, 256), 7))):
        cache = attachment_of(model).new_cache()
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        sizes[name] = deflated_nbytes(cache)
        assert sizes[name] <= cache.nbytes()
    detach(model)
    assert sizes["same"] < 0.8 * sizes["random"]
