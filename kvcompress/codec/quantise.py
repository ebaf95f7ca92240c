"""Uniform mid-rise quantisers: a static step for each component, and a gain for each token.

A component z of b bits is stored as code = clamp(floor(z / (g step)) + 2^(b-1), 0, 2^b - 1) and rebuilt as
(code - 2^(b-1) + 1/2) g step. The step is fitted to samples of the component. The gain g is the token's own: the
one of GAINS with which the token is rebuilt best, so that a token unlike the calibration text is not clipped, and a
small one is not drowned in steps made for larger ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.options import GAIN_BITS

#: The gains: quarters of an octave, from 1/2 up to 6.7.
_LOWEST_GAIN, _GAINS_PER_OCTAVE = -4, 4

#: The step of least mean squared error for a Gaussian of variance 1 (Max, IRE Trans. Inf. Theory 6, 1960).
_GAUSSIAN_STEP = {1: 1.596, 2: 0.996, 4: 0.335, 8: 0.0308}
#: Components have variance 1; one that the samples never moved still gets a step that can be divided by.
_LEAST_POWER = 1e-12
#: Numbers that stay in a processor's cache while gains are tried on them.
_CACHED = 1 << 17
#: Numbers that a GPU tries all gains on at once.
_TOGETHER = 1 << 21
#: Components whose steps are fitted at once: as many as stay in a processor's cache.
_AT_ONCE = 64
#: Steps tried, as multiples of the Gaussian one: down to distributions without tails, up to long ones ...
_TRIED = torch.logspace(-1.3, 1.3, 9, base=2.0).tolist()
#: ... and then around the best of those.
_REFINED = torch.logspace(-0.13, 0.13, 5, base=2.0).tolist()


def quantise(z: Tensor, half: Tensor | float) -> Tensor:
    """Return the codes 0..2 half - 1, in z's dtype, of z in units of its step; half = 2^(b-1)."""
    return (z.floor() + half).clamp_min(0).minimum(torch.as_tensor(2 * half - 1, device=z.device, dtype=z.dtype))


def dequantise(codes: Tensor, half: Tensor | float) -> Tensor:
    """Return the values, in units of the step, that codes stand for."""
    return codes - (half - 0.5)


def gain(code: Tensor) -> Tensor:
    """Return the gains, float32, that codes 0..15 stand for."""
    return torch.exp2((code.float() + _LOWEST_GAIN) / _GAINS_PER_OCTAVE)


@torch.no_grad()
def best_gain(z: Tensor, half: Tensor) -> Tensor:
    """Return the code of each token's gain: [...]; z: [..., R] in units of the steps, half: [R].

    The error is summed in steps: water-filling gives components steps that cost about the same.
    """
    return least_gain(gain_errors(z, half))


def least_gain(errors: Tensor) -> Tensor:
    """Return the code of the gain of least error, the first of several: uint8 [...]; errors: [..., 16]."""
    return errors.argmin(-1).to(torch.uint8)


@torch.no_grad()
def gain_errors(z: Tensor, half: Tensor) -> Tensor:
    """Return the squared error of each token under each gain, in steps: [..., 16]; z, half: of `best_gain`.

    Errors of parts of a token's components add up to those of all: ranks that hold some heads each choose one gain so.
    """
    rows, width = z.reshape(z.shape[:-1].numel(), z.shape[-1]), max(1, z.shape[-1])
    found, at_once = (_errors_together, _TOGETHER) if z.is_cuda else (_errors_in_turn, _CACHED)
    errors = torch.cat([found(some, half) for some in rows.split(max(1, at_once // width))])
    return errors.reshape(*z.shape[:-1], 2**GAIN_BITS)


def _errors_in_turn(z: Tensor, half: Tensor) -> Tensor:
    errors, error = z.new_empty(len(z), 2**GAIN_BITS), torch.empty_like(z)
    for code, g in enumerate(gain(torch.arange(2**GAIN_BITS)).tolist()):
        torch.div(z, g, out=error)
        torch.minimum(torch.maximum(error.floor_(), -half, out=error), half - 1, out=error)
        errors[:, code] = error.add_(0.5).mul_(g).sub_(z).square_().sum(-1)
    return errors


def _errors_together(z: Tensor, half: Tensor) -> Tensor:
    """Return what `_errors_in_turn` does, in a tenth of the steps that a GPU is told of."""
    gains = gain(torch.arange(2**GAIN_BITS, device=z.device)).view(-1, 1, 1)
    codes = (z / gains).floor_().clamp_min_(-half).clamp_max_(half - 1)
    return codes.add_(0.5).mul_(gains).sub_(z).square_().sum(-1).T.contiguous()


def fit_steps(samples: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (step [R], distortion [R]): the steps of least mean squared error at `bits`, and that error.

    samples: [n_samples, R]. The error is relative to the components' mean square: c(b) in choose.bits.
    """
    at_once = max(1, samples.shape[1]) if samples.is_cuda else _AT_ONCE
    parts = [_fit_steps(some.contiguous(), bits) for some in samples.split(at_once, 1)]
    step, distortion = zip(*parts, strict=True)
    return torch.cat(step), torch.cat(distortion)


def _fit_steps(samples: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    half = 2.0 ** (bits - 1)
    power = samples.square().mean(0).clamp_min(_LEAST_POWER)
    best, least = torch.ones_like(power), torch.full_like(power, float("inf"))
    error = torch.empty_like(samples)
    for multiples in (_TRIED, _REFINED):
        middle = _GAUSSIAN_STEP[bits] * power.sqrt() if multiples is _TRIED else best
        for multiple in multiples:
            step = multiple * middle
            torch.div(samples, step, out=error)
            error.floor_().clamp_(-half, half - 1).add_(0.5).mul_(step).sub_(samples).square_()
            relative = error.mean(0) / power
            best = torch.where(relative < least, step, best)
            least = torch.minimum(least, relative)
    return best, least
