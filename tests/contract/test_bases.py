"""What every basis must satisfy, one suite for all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvcompress.bases import BASES
from kvcompress.bases.base import expected_loss
from kvcompress.codec.codec import SiteCodec
from kvcompress.model.model_spec import AttentionSpec
from kvcompress.model.rope import Rotary
from kvcompress.options import FOLDABLE_KEY_BASES, KEY_BASES, VALUE_BASES
from tests.basis_cases import ATTENTIONS, EIGEN, HEAD_DIM, MAKERS, Case, make_case, projector, ridged, site_maps


@pytest.fixture(params=[(b, a) for b in MAKERS for a in ATTENTIONS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


def rotation(spec: AttentionSpec, position: int) -> Tensor:
    """Return RoPE at a position as a matrix [n, n], float64; the identity where the layer has none."""
    if not spec.rotary_dim:
        return torch.eye(spec.width, dtype=torch.float64)
    rotary = Rotary(0.5 ** torch.arange(spec.rotary_dim // 2), 1.0)
    unit = torch.eye(spec.width).reshape(spec.width, spec.n_kv_heads, 1, HEAD_DIM)
    return rotary.rotate(unit, torch.tensor([[position]])).reshape(spec.width, spec.width).T.double()


def test_registry_and_options_name_the_same_bases() -> None:
    assert set(BASES) == set(KEY_BASES)
    assert {n for n, b in BASES.items() if "value" in b.parts} == set(VALUE_BASES)
    assert {n for n, b in BASES.items() if b.commutes_with_rope} == set(FOLDABLE_KEY_BASES)
    assert all(BASES[name].name == name and "key" in BASES[name].parts for name in BASES)


def test_blocks_are_a_partition(case: Case) -> None:
    assert torch.equal(case.blocks.flatten().sort().values, torch.arange(case.attention.width))


def test_items_account_for_every_number(case: Case) -> None:
    assert int(case.fitted.numbers.sum()) == case.attention.width
    for n_items in range(case.n_items + 1):
        components = case.components(n_items)
        n = int(case.fitted.numbers[:n_items].sum())
        assert components.encoder.shape == components.decoder.shape == (n, case.blocks.shape[1])
        assert components.block.shape == (n,)


def test_full_rank_is_lossless(case: Case) -> None:
    whole = torch.eye(case.attention.width, dtype=torch.float64)
    assert (projector(case, case.n_items) - whole).abs().max() < 1e-9
    loss = expected_loss(case.covariance, case.fisher, case.components(case.n_items))
    assert loss == pytest.approx(0, abs=1e-12)


def test_projection(case: Case) -> None:
    """Decoding and encoding again changes nothing: decoder @ encoder is idempotent and has the rank it says."""
    for n_items in range(case.n_items + 1):
        p = projector(case, n_items)
        assert (p @ p - p).abs().max() < 1e-8
        assert p.trace().item() == pytest.approx(int(case.fitted.numbers[:n_items].sum()), abs=1e-8)


def test_error_is_the_tail_energy_and_falls_with_rank(case: Case) -> None:
    metric = case.fisher if case.basis.name == "share" else ridged(case.fisher)
    losses = [expected_loss(case.covariance, metric, case.components(r)) for r in range(case.n_items + 1)]
    for n_items, loss in enumerate(losses):
        assert loss == pytest.approx(float(case.fitted.energy[n_items:].sum()), rel=1e-8, abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in pairwise(losses))
    assert losses[0] > 0


@pytest.mark.parametrize("name", EIGEN)
@pytest.mark.parametrize("attention_name", ATTENTIONS)
def test_energies_descend(name: str, attention_name: str) -> None:
    energy = make_case(name, attention_name).fitted.energy
    assert (energy[:-1] >= energy[1:]).all() and (energy >= 0).all()


@pytest.mark.parametrize("attention_name", ATTENTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_commutes_with_rope_if_and_only_if_marked(name: str, attention_name: str) -> None:
    case = make_case(name, attention_name)
    for n_items in range(1, case.n_items):
        p = projector(case, n_items)
        for position in (1, 17):
            r = rotation(case.attention, position)
            difference = (p @ r - r @ p).abs().max()
            if case.basis.commutes_with_rope or not case.attention.rotary_dim:
                assert difference < 1e-6
            elif n_items == case.n_items // 2:
                assert difference > 1e-3


@pytest.mark.parametrize("attention_name", ["mha", "two-heads", "mqa"])
@pytest.mark.parametrize("name", ["head", "share", "frequency-whole"])
def test_virtual_heads_turn_like_real_ones(name: str, attention_name: str) -> None:
    """rotate(encode(x)) == encode(rotate(x)), with latents laid out as heads: what the folded form relies on."""
    case = make_case(name, attention_name)
    spec, rotary = case.attention, Rotary(0.5 ** torch.arange(HEAD_DIM // 2), 1.0)
    keys = torch.randn(2, spec.n_kv_heads, 5, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 5, 30, 100], [3, 4, 5, 6, 7]])
    for n_items in range(1, case.n_items + 1):
        codec = SiteCodec(site_maps(case, n_items), torch.device("cpu"))

        def encode(x: Tensor, codec: SiteCodec = codec) -> Tensor:
            latents = codec.encode(x.transpose(1, 2).flatten(2)).components
            return latents.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)

        turned = rotary.rotate(encode(keys), positions)
        torch.testing.assert_close(encode(rotary.rotate(keys, positions)), turned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention_name", ["mha", "mqa", "partial"])
@pytest.mark.parametrize("name", MAKERS)
def test_codec_computes_the_projection(name: str, attention_name: str) -> None:
    """SiteCodec (blocked, padded, float32) against the dense matrix, at every rank; nothing is lost at the full one."""
    case = make_case(name, attention_name)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, case.attention.width, generator=generator)
    mean = torch.randn(case.attention.width, generator=generator)
    for n_items in range(case.n_items + 1):
        codec = SiteCodec(site_maps(case, n_items, mean), torch.device("cpu"))
        latents = codec.encode(x - mean).components
        assert latents.shape == (2, 5, int(case.fitted.numbers[:n_items].sum()))
        expected = (x - mean).double() @ projector(case, n_items).T
        torch.testing.assert_close(codec.decode(latents), expected.float(), rtol=1e-3, atol=1e-3)
        query = torch.randn(2, 5, case.attention.width, generator=generator)
        scores = (codec.absorb(query) * latents).sum(-1)
        torch.testing.assert_close(scores, (query * expected).sum(-1).float(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(codec.decode(latents) + mean, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention_name", ATTENTIONS)
@pytest.mark.parametrize("name", EIGEN)
def test_components_have_unit_variance(name: str, attention_name: str) -> None:
    """So that 16 bits hold any of them. A complex component shares it among two numbers, a head among its channels."""
    case = make_case(name, attention_name)
    components = case.components(case.n_items)
    chosen = case.covariance[components.block]
    variance = torch.einsum("rw,rwv,rv->r", components.encoder, chosen, components.encoder)
    if name == "head":
        variance = variance.reshape(-1, HEAD_DIM).mean(1)
    expected = torch.full_like(variance, 0.5 if case.basis.name == "frequency" else 1.0)
    torch.testing.assert_close(variance, expected)
