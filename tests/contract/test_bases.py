"""What every basis must satisfy, one suite for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvcompress.bases import BASES, Basis, Components
from kvcompress.bases.base import _FISHER_RIDGE, FittedBasis, expected_loss
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.model_spec import AttentionSpec, Projection
from kvcompress.options import FOLDABLE_KEY_BASES, KEY_BASES, VALUE_BASES
from kvcompress.rope import Rotary
from kvcompress.runtime.codec import SiteCodec

HEAD_DIM = 8


def attention(n_kv_heads: int, rotary_dim: int = HEAD_DIM) -> AttentionSpec:
    projection = Projection("w", None, "m", 0, n_kv_heads * HEAD_DIM)
    return AttentionSpec(0, n_kv_heads, n_kv_heads, HEAD_DIM, rotary_dim, projection, projection)


ATTENTIONS = {
    "mha": attention(4),
    "two-heads": attention(2),
    "mqa": attention(1),
    "partial": attention(4, rotary_dim=4),
    "no-rope": attention(4, rotary_dim=0),
}
MAKERS: dict[str, Callable[[], Basis]] = {
    **BASES,
    "frequency-whole": lambda: BASES["frequency"](whole_heads=True),
    "band-4": lambda: BASES["band"](4),
    "band-2": lambda: BASES["band"](2),
    "latent-group": lambda: BASES["latent"](1),
    "latent-unit": lambda: BASES["latent"](unit=4),
}
EIGEN = [name for name in MAKERS if name != "share"]


def spd(n: int, seed: int, decay: float = 4.0) -> Tensor:
    """Return a random symmetric positive definite [n, n] whose eigenvalues span 10^-decay to 1."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * torch.logspace(0, -decay, n, dtype=torch.float64)) @ q.T


def select(moment: Tensor, blocks: Tensor) -> Tensor:
    """Return the blocks [n_blocks, w, w] of a full moment [n, n]."""
    return moment[blocks.unsqueeze(2), blocks.unsqueeze(1)]


def phase_average(moment: Tensor) -> Tensor:
    """Return the part of moments of (re, im) that a common phase leaves alone."""
    h = moment.shape[1] // 2
    turn = torch.zeros(2 * h, 2 * h, dtype=torch.float64)
    turn[:h, h:], turn[h:, :h] = -torch.eye(h), torch.eye(h)
    return (moment + turn @ moment @ turn.T) / 2


def ridged(fisher: Tensor) -> Tensor:
    """Return F with the ridge that the eigen bases add to it."""
    mean = fisher.diagonal(dim1=1, dim2=2).mean(1)
    return fisher + _FISHER_RIDGE * mean[:, None, None] * torch.eye(fisher.shape[1], dtype=torch.float64)


class Case(NamedTuple):
    """A fitted basis, with moments of the symmetry that the basis can see, so that its energies are exact."""

    attention: AttentionSpec
    basis: Basis
    blocks: Tensor
    covariance: Tensor
    fisher: Tensor
    fitted: FittedBasis

    def components(self, n_items: int) -> Components:
        return self.fitted.components(n_items)

    @property
    def n_items(self) -> int:
        return len(self.fitted.energy)


def make_case(name: str, attention_name: str, seed: int = 0) -> Case:
    spec, basis = ATTENTIONS[attention_name], MAKERS[name]()
    blocks = basis.blocks(spec)
    covariance = select(spd(spec.width, seed), blocks)
    fisher = select(spd(spec.width, seed + 1, decay=2), blocks)
    if basis.name == "frequency":
        covariance, fisher = phase_average(covariance), phase_average(fisher)
    if basis.name in ("head", "share"):
        fisher = fisher.mean(0, keepdim=True).expand_as(fisher)
    if basis.name == "share":  # groups are priced one by one, as if the loss of one did not see the others' errors
        fisher = torch.diag_embed(fisher.diagonal(dim1=1, dim2=2))
    return Case(spec, basis, blocks, covariance, fisher, basis.fit(covariance, fisher))


@pytest.fixture(params=[(b, a) for b in MAKERS for a in ATTENTIONS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


def projector(case: Case, n_items: int) -> Tensor:
    """Return D E over the whole site, [n, n]."""
    n = case.attention.width
    matrix = torch.zeros(n, n, dtype=torch.float64)
    components = case.components(n_items)
    for encoder, decoder, block in zip(components.encoder, components.decoder, components.block.tolist(), strict=True):
        places = case.blocks[block]
        matrix[places[:, None], places[None, :]] += decoder[:, None] * encoder[None, :]
    return matrix


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
    assert all(a >= b - 1e-12 for a, b in zip(losses, losses[1:], strict=False))
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
        codec = SiteCodec(site_maps(case, n_items), torch.device("cpu"), torch.float32)

        def encode(x: Tensor, codec: SiteCodec = codec) -> Tensor:
            return codec.encode(x.transpose(1, 2).flatten(2)).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)

        turned = rotary.rotate(encode(keys), positions)
        torch.testing.assert_close(encode(rotary.rotate(keys, positions)), turned, rtol=1e-4, atol=1e-4)


def site_maps(case: Case, n_items: int, mean: Tensor | None = None) -> SiteMaps:
    components = case.components(n_items)
    return SiteMaps(
        blocks=case.blocks.int(),
        encoder=components.encoder.float(),
        decoder=components.decoder.float(),
        block=components.block.int(),
        bits=torch.full(components.block.shape, 32, dtype=torch.uint8),
        mean=mean,
    )


@pytest.mark.parametrize("attention_name", ["mha", "mqa", "partial"])
@pytest.mark.parametrize("name", MAKERS)
def test_codec_computes_the_projection(name: str, attention_name: str) -> None:
    """SiteCodec (blocked, padded, float32) against the dense matrix, at every rank; nothing is lost at the full one."""
    case = make_case(name, attention_name)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, case.attention.width, generator=generator)
    mean = torch.randn(case.attention.width, generator=generator)
    for n_items in range(case.n_items + 1):
        codec = SiteCodec(site_maps(case, n_items, mean), torch.device("cpu"), torch.float32)
        latents = codec.encode(x)
        assert latents.shape == (2, 5, int(case.fitted.numbers[:n_items].sum()))
        expected = (x - mean).double() @ projector(case, n_items).T + mean
        torch.testing.assert_close(codec.decode(latents), expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(codec.decode(latents), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention_name", ATTENTIONS)
@pytest.mark.parametrize("name", EIGEN)
def test_components_have_unit_variance(name: str, attention_name: str) -> None:
    """So that 16 bits hold any of them. A complex component's unit is shared by its two numbers, a head's by its channels."""
    case = make_case(name, attention_name)
    components = case.components(case.n_items)
    chosen = case.covariance[components.block]
    variance = torch.einsum("rw,rwv,rv->r", components.encoder, chosen, components.encoder)
    if name == "head":
        variance = variance.reshape(-1, HEAD_DIM).mean(1)
    expected = torch.full_like(variance, 0.5 if case.basis.name == "frequency" else 1.0)
    torch.testing.assert_close(variance, expected)


def loss_in(covariance: Tensor, metric: Tensor, case: Case, n_numbers: int, *, metric_blocks: Tensor) -> float:
    """Return 1/2 tr(F e e^T) of the case's best n_numbers, F and C taken as block-diagonal over metric_blocks."""
    n_items = int((case.fitted.numbers.cumsum(0) <= n_numbers).sum())
    assert int(case.fitted.numbers[:n_items].sum()) == n_numbers
    n = case.attention.width
    c, f = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for block, covariance_block, metric_block in zip(metric_blocks, covariance, metric, strict=True):
        c[block[:, None], block[None, :]] = covariance_block
        f[block[:, None], block[None, :]] = metric_block
    residual = torch.eye(n, dtype=torch.float64) - projector(case, n_items)
    return 0.5 * float((f * (residual @ c @ residual.T)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("best", "others"),
    [
        ("latent", ["per_head", "band-4", "band-2", "frequency", "frequency-whole", "head", "share"]),
        ("band-4", ["band-2", "frequency", "frequency-whole", "head", "share"]),
        ("band-2", ["frequency", "frequency-whole", "head", "share"]),
        ("frequency", ["frequency-whole", "head", "share"]),
        ("frequency-whole", ["head", "share"]),
        ("head", ["share"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_freer_mixing_loses_less(best: str, others: list[str], seed: int) -> None:
    """At the same rank and on the same moments, in the metric that the freer basis sees."""
    spec = ATTENTIONS["mha"]
    full_c, full_f = spd(spec.width, 10 + seed), spd(spec.width, 20 + seed, decay=2)
    cases = {}
    for name in [best, *others]:
        basis = MAKERS[name]()
        blocks = basis.blocks(spec)
        c, f = select(full_c, blocks), select(full_f, blocks)
        cases[name] = Case(spec, basis, blocks, c, f, basis.fit(c, f))
    blocks, c, f = cases[best].blocks, cases[best].covariance, cases[best].fisher
    if best.startswith("frequency"):
        c, f = phase_average(c), phase_average(f)
    if best == "frequency-whole":  # one ridge per frequency, as it fits each of them alone
        assert blocks.shape[0] == HEAD_DIM // 2
    if best == "head":
        f = f.mean(0, keepdim=True).expand_as(f)
    for n_numbers in (8, 16, 24):
        losses = {n: loss_in(c, ridged(f), case, n_numbers, metric_blocks=blocks) for n, case in cases.items()}
        for name in others:
            assert losses[best] <= losses[name] * (1 + 1e-9)
        assert losses[best] < losses[others[-1]]  # and not because all of them are equal


DEGENERATE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "zero fisher": lambda c, f: (c, torch.zeros_like(f)),
    "rank-deficient covariance": lambda c, f: (low_rank(c), f),
    "rank-deficient fisher": lambda c, f: (c, low_rank(f)),
    "zero covariance": lambda c, f: (torch.zeros_like(c), f),
    "one dead head": lambda c, f: (dead_head(c), dead_head(f)),
    "tiny": lambda c, f: (1e-8 * c, 1e-16 * f),
    "large": lambda c, f: (1e6 * c, 1e6 * f),
}


def low_rank(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T


def dead_head(moment: Tensor) -> Tensor:
    moment = moment.clone()
    moment[:HEAD_DIM] = moment[:, :HEAD_DIM] = 0
    return moment


@pytest.mark.parametrize("attention_name", ["mha", "mqa"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("degeneration", DEGENERATE)
def test_degenerate_moments_stay_finite(name: str, attention_name: str, degeneration: str) -> None:
    """Finite maps that still invert each other in float32, as they are stored and used."""
    spec, basis = ATTENTIONS[attention_name], MAKERS[name]()
    blocks = basis.blocks(spec)
    c, f = DEGENERATE[degeneration](spd(spec.width, 0), spd(spec.width, 1, decay=2))
    fitted = basis.fit(select(c, blocks), select(f, blocks))
    assert fitted.energy.isfinite().all() and (fitted.energy >= -1e-9).all()
    case = Case(spec, basis, blocks, c, f, fitted)
    x = torch.randn(3, spec.width, generator=torch.Generator().manual_seed(0))
    for n_items in range(case.n_items + 1):
        codec = SiteCodec(site_maps(case, n_items), torch.device("cpu"), torch.float32)
        assert codec.encoder.isfinite().all() and codec.decoder.isfinite().all()
        assert codec.decode(codec.encode(x)).isfinite().all()
    assert (codec.decode(codec.encode(x)) - x).abs().max() < 0.05


@pytest.mark.parametrize("name", EIGEN)
@pytest.mark.parametrize("deviation", [1e-2, 1.0, 1e2])
def test_maps_of_16_bit_checkpoints_fit_float16(name: str, deviation: float) -> None:
    """Values of small layers have deviations of 0.01, and spectra that fall by eight orders of magnitude."""
    spec, basis = ATTENTIONS["mha"], MAKERS[name]()
    blocks = basis.blocks(spec)
    c, f = deviation**2 * spd(spec.width, 0, decay=8), spd(spec.width, 1, decay=2)
    components = basis.fit(select(c, blocks), select(f, blocks)).components(
        len(basis.fit(select(c, blocks), select(f, blocks)).energy)
    )
    case = make_case(name, "mha")
    maps = dataclasses.replace(
        site_maps(case, 0),
        blocks=blocks,
        encoder=components.encoder.half(),
        decoder=components.decoder.half(),
        block=components.block,
    )
    assert maps.encoder.isfinite().all() and maps.decoder.isfinite().all()
    codec = SiteCodec(maps, torch.device("cpu"), torch.float16)
    root = torch.linalg.cholesky(c + 1e-12 * deviation**2 * torch.eye(spec.width, dtype=torch.float64))
    x = (torch.randn(200, spec.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ root.T).float()
    error = (codec.decode(codec.encode(x)) - x).square().mean().sqrt()
    assert error < 0.01 * x.square().mean().sqrt()


def test_random_input_is_seeded() -> Any:
    assert torch.equal(spd(4, 0), spd(4, 0))
    assert not torch.equal(spd(4, 0), spd(4, 1))
