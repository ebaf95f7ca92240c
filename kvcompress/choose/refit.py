"""Decoders and means fitted once more, by least squares, to what is stored of tokens.

A basis has the decoders of exact components. But codes are not what they stand for: their errors go with them, and
what was dropped of a token goes with both. So a site's decoder is what rebuilds its tokens best from their codes.

Samples tell how the codes z of a token x, without its mean, go with it: z = M x + e with e that does not. The second
moments of x, by which all is weighed, are known of all tokens. Of what samples say beyond each code's own component,
as much is believed as two halves of them agree on: where codes have many bits there is little to find, and two
thousand tokens would rather tell of themselves.

Steps come first: they were fitted to components alone (choose.bits), and a token's gain takes from the larger ones, so
that behind the gains finer steps err less.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.quantise import best_gain, gain
from kvcompress.side_by_side import solved

#: How much decoders lean on what they were, as a share of the power of each code.
_LEAN = 0.01
#: Keep what is solved for solvable where a site has numbers that never move.
_TINY, _LEAST = 1e-9, 1e-30
#: Runs of samples that are halves by turns: neighbours are of one text, and halves should be of all.
_RUNS = 16
#: Steps that are tried, as multiples of what they were; and how often, since other steps mean other gains.
_MULTIPLES = torch.logspace(-0.5, 0.5, 11, base=2.0).tolist()
_ROUNDS = 2
#: Components whose steps a processor tries at once: as many as stay in its cache.
_AT_ONCE = 64
_STEADY_BITS = 16


def refitted(maps: SiteMaps, sums: SiteMoments, *, device: str = "cpu") -> SiteMaps:
    """Return maps whose steps, decoder and mean suit their own codes. sums: the moments of what the maps encode.

    device: where samples are encoded, and where decoders are solved for. Maps without quantised components,
    or without a mean, are returned as they are, and so are any without two samples.
    """
    if maps.mean is None or len(sums.samples) < 2 or not bool((maps.bits < 16).any()):
        return maps
    x, mean = sums.samples.to(device) - maps.mean.to(device), maps.mean.double()
    maps = _with_steps(maps, x)
    codec = SiteCodec(maps, x.device)
    codes = (codec.latents(codec.encode(x)) * codec.step).double()
    blocks = maps.blocks.long()
    covariance = sums.covariance(blocks, centred=True, device=device)
    decoder = maps.decoder.double()
    for b, numbers in enumerate(blocks):
        mine = (maps.block == b).nonzero()[:, 0]
        if not len(mine):
            continue
        encoder, before = (t[mine].double().to(device) for t in (maps.encoder, decoder))
        own = codes[:, mine.to(device)], x[:, numbers.to(device)].double()
        decoder[mine], shift = (t.cpu() for t in _fitted(*own, encoder, covariance[b], before))
        mean[numbers] += shift
    limit = torch.finfo(maps.decoder.dtype).max
    return replace(maps, decoder=decoder.clamp(-limit, limit).to(maps.decoder.dtype), mean=_steady(mean))


def _with_steps(maps: SiteMaps, x: Tensor) -> SiteMaps:
    """Return maps with the steps of least squared error behind the gains; x: [n_samples, n], without the mean."""
    first = int((maps.bits > 8).sum())  # those before it are numbers
    half = 2.0 ** (maps.bits[first:].to(x.device).float() - 1)
    z = SiteCodec(maps, x.device).project(x)[:, first:]
    wider = torch.ones_like(half)
    for _ in range(_ROUNDS):
        gains = gain(best_gain(z, half)).unsqueeze(-1)
        best = _best_multiples(z / gains, gains[:, 0].square(), half)
        z, wider = z / best, wider * best
    return replace(maps, step=_steady(torch.cat([maps.step[:first], maps.step[first:] * wider.to(maps.step.device)])))


def _steady(numbers: Tensor) -> Tensor:
    """Return numbers as float32 of 16 bits, which other last digits of the moments hardly ever change.

    Sums differ by those with who added them up, and a model that runs in 16 bits makes a hundredth of a last digit in
    the decoders of values that are fitted to what it reads (runtime.value_fit). Encoders and decoders have 11 bits.
    """
    mantissa, exponent = torch.frexp(numbers.double())
    return torch.ldexp((mantissa * 2.0**_STEADY_BITS).round() / 2.0**_STEADY_BITS, exponent).float()


def _best_multiples(z: Tensor, weight: Tensor, half: Tensor) -> Tensor:
    """Return the multiple of each component's step that errs least, [R]; z: [n_samples, R] behind gains, in steps.

    weight: [n_samples], the square of each token's gain.
    """
    at_once, best = len(half) if z.is_cuda else _AT_ONCE, []
    for some, own in zip(z.split(max(1, at_once), 1), half.split(max(1, at_once)), strict=True):
        exact, errors = some.contiguous(), []
        error = torch.empty_like(exact)
        for multiple in _MULTIPLES:
            torch.div(exact, multiple, out=error)
            torch.minimum(torch.maximum(error.floor_(), -own, out=error), own - 1, out=error)
            errors.append(weight @ error.add_(0.5).mul_(multiple).sub_(exact).square_())
        best.append(torch.stack(errors).argmin(0))
    return torch.tensor(_MULTIPLES, device=z.device)[torch.cat(best)]


def _fitted(codes: Tensor, x: Tensor, encoder: Tensor, covariance: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's decoder [R, w] of least squares, and what is to be added to its mean, [w].

    codes: [n_samples, R], in units of the components; x: [n_samples, w], what they are of; covariance: of all tokens;
    before: what the decoder leans on. The fewer the samples, the less they say beyond z = E x.
    """
    error = codes - x @ encoder.T
    mean = error.mean(0)
    halves = _halves(len(x), x.device)
    matrix = encoder + _slope(error, x, encoder, covariance, halves)
    wanted = matrix @ covariance
    gram = wanted @ matrix.T + _noise(codes - mean - x @ matrix.T, halves)
    lean = _LEAN * gram.diagonal() + _LEAST
    decoder = torch.linalg.solve(gram + lean.diag(), wanted + lean[:, None] * before)
    return decoder, -mean @ decoder  # codes of the mean token stand for the mean


def _slope(error: Tensor, x: Tensor, encoder: Tensor, covariance: Tensor, halves: tuple[Tensor, Tensor]) -> Tensor:
    """Return how the errors of codes [n_samples, R] go with tokens x, [R, w].

    With its own component each as samples say, with all else as far as the halves agree.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (one @ covariance * other).sum(1, keepdim=True)

    known, wanted = [], []
    for part in (slice(None), *halves):
        some, own = x[part], error[part]
        n, width = some.shape
        known.append(some.T @ some / n + width / n * covariance)
        known[-1].diagonal().add_(_TINY * known[-1].diagonal().mean() + _LEAST)
        wanted.append(some.T @ (own - own.mean(0)) / n)
    along, beyond = [], []
    for slope in solved(torch.stack(known), torch.stack(wanted)).mT:
        along.append(inner(slope, encoder) / inner(encoder, encoder).clamp_min(_LEAST) * encoder)
        beyond.append(slope - along[-1])
    whole, one, other = beyond
    mean = (one + other) / 2
    return along[0] + _share(inner(one, other), inner(mean, mean)) * whole


def _noise(noise: Tensor, halves: tuple[Tensor, Tensor]) -> Tensor:
    """Return the second moments of what is left of codes, [R, R]; between codes as far as halves agree on them."""
    power = noise.square().mean(0)
    scaled = noise / power.clamp_min(_LEAST).sqrt()
    one, other = (scaled[half].T @ scaled[half] / len(half) for half in halves)
    for correlation in (one, other):
        correlation.fill_diagonal_(0)
    mean = (one + other) / 2
    between = _share((one * other).sum(), mean.square().sum()) * mean
    deviation = power.sqrt()
    return deviation[:, None] * between.fill_diagonal_(1) * deviation


def _halves(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which of n samples are one half and which the other, as indices."""
    one = torch.arange(n) * min(_RUNS, n) // n % 2 == 0
    return one.nonzero()[:, 0].to(device), (~one).nonzero()[:, 0].to(device)


def _share(both: Tensor, mean: Tensor) -> Tensor:
    """Return the share of the power of what two halves say in the mean that both of them say, from 0 to 1."""
    return (both / mean.clamp_min(_LEAST)).clamp(0, 1)
