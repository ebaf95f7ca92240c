"""Quantisers: the best static step, and the gain that a token chooses."""

from __future__ import annotations

import pytest
import torch

from kvcompress.codec.quantise import _errors_together, best_gain, dequantise, fit_steps, gain, gain_errors, quantise
from kvcompress.options import GAIN_BITS, LEVELS

#: Least mean squared error of a uniform quantiser for a Gaussian (Max 1960), relative to its variance.
MAX_1960 = {1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 0.0001}  # the last hangs on the largest of the samples


@pytest.mark.parametrize("bits", LEVELS)
def test_codes_are_whole_numbers_in_range_and_cells_have_their_values_in_the_middle(bits: int) -> None:
    half = 2.0 ** (bits - 1)
    z = torch.linspace(-2 * half, 2 * half, 1001)
    codes = quantise(z, half)
    assert torch.equal(codes, codes.round()) and codes.min() == 0 and codes.max() == 2**bits - 1
    inside = z.abs() < half
    assert (dequantise(codes, half) - z)[inside].abs().max() <= 0.5
    assert torch.equal(quantise(dequantise(codes, half), half), codes)  # a second time changes nothing


@pytest.mark.parametrize("bits", LEVELS)
def test_a_gaussian_gets_the_published_distortion(bits: int) -> None:
    samples = torch.randn(50_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0, 1e-3])
    step, distortion = fit_steps(samples, bits)
    assert distortion.tolist() == pytest.approx([MAX_1960[bits]] * 3, rel=0.03 if bits < 8 else 0.2)
    torch.testing.assert_close(step / samples.std(0), step[:1].expand(3) / samples[:, 0].std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("tails", ["uniform", "gaussian", "laplace"])
def test_no_other_step_is_much_better(bits: int, tails: str) -> None:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(20_000, 1, generator=generator) * 2 - 1
    samples = {
        "uniform": uniform,
        "gaussian": torch.randn(20_000, 1, generator=generator),
        "laplace": -uniform.sign() * (1 - uniform.abs()).clamp_min(1e-7).log(),
    }[tails]
    half = 2.0 ** (bits - 1)
    _, distortion = fit_steps(samples, bits)
    power = samples.square().mean()
    others = [
        ((samples - dequantise(quantise(samples / s, half), half) * s).square().mean() / power).item()
        for s in torch.logspace(-3, 1, 400).tolist()
    ]
    assert distortion.item() <= (1.03 if bits < 8 else 1.3) * min(others)  # steps are tried a twentieth apart


def test_a_component_that_never_moved_gets_a_step_that_can_be_divided_by() -> None:
    step, distortion = fit_steps(torch.zeros(10, 2), 4)
    assert (step > 0).all() and step.isfinite().all() and distortion.isfinite().all()


def test_the_gain_is_the_best_of_all_gains() -> None:
    half = torch.tensor([1.0, 1.0, 2.0, 8.0, 128.0])
    scale = torch.logspace(-2, 2, 40)[:, None]
    z = torch.randn(40, 5, generator=torch.Generator().manual_seed(2)) * half * scale
    errors = []
    for code in range(2**GAIN_BITS):
        g = gain(torch.tensor(code))
        errors.append((dequantise(quantise(z / g, half), half) * g - z).square().sum(-1))
    table = torch.stack(errors)
    chosen = best_gain(z, half)
    torch.testing.assert_close(gain_errors(z, half), table.T)
    torch.testing.assert_close(_errors_together(z, half), table.T)  # as a GPU finds them
    assert chosen.dtype == torch.uint8 and len(set(chosen.tolist())) > 8
    assert torch.equal(table.gather(0, chosen[None].long())[0], table.amin(0))


def test_a_components_step_does_not_depend_on_its_neighbours() -> None:
    """Steps are fitted to some components at once; none of them may see another."""
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(500, 150, generator=generator) * torch.logspace(-3, 3, 150)
    together = fit_steps(samples, 2)
    for i in (0, 63, 64, 149):
        alone = fit_steps(samples[:, i : i + 1], 2)
        assert torch.allclose(together[0][i], alone[0][0], rtol=1e-5)
        assert torch.allclose(together[1][i], alone[1][0], rtol=1e-4)
