"""Decoders and means fitted once more, by least squares, to what is stored of tokens.

A basis has the decoders of exact components. But codes are not what they stand for: their errors go with them, and
what was dropped of a token goes with both. So a site's decoder is what rebuilds its tokens best from their codes.

Samples tell how the codes z of a token x, without its mean, go with it: z = M x + e with e that does not. The second
moments of x, by which all is weighed, are known of all tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec

#: How much decoders lean on what they were, as a share of the power of each code.
_LEAN = 0.01
#: Keep what is solved for solvable where a site has numbers that never move.
_TINY, _LEAST = 1e-9, 1e-30


def refitted(maps: SiteMaps, sums: SiteMoments, *, device: str = "cpu") -> SiteMaps:
    """Return maps whose decoder and mean suit their own codes. sums: the moments of what the maps encode.

    device: where samples are encoded, and where decoders are solved for. Maps without quantised components,
    or without a mean, are returned as they are, and so are any without samples.
    """
    if maps.mean is None or not len(sums.samples) or not bool((maps.bits < 16).any()):
        return maps
    codec = SiteCodec(maps, torch.device(device))
    assert codec.mean is not None
    x = sums.samples.to(device) - codec.mean
    codes = (codec.latents(codec.encode(x)) * codec.step).double()
    blocks = maps.blocks.long()
    covariance = sums.covariance(blocks, centred=True, device=device)
    decoder, mean = maps.decoder.double(), maps.mean.double()
    for b, numbers in enumerate(blocks):
        mine = (maps.block == b).nonzero()[:, 0]
        if not len(mine):
            continue
        encoder, before = (t[mine].double().to(device) for t in (maps.encoder, decoder))
        own = codes[:, mine.to(device)], x[:, numbers.to(device)].double()
        decoder[mine], shift = (t.cpu() for t in _fitted(*own, encoder, covariance[b], before))
        mean[numbers] += shift
    limit = torch.finfo(maps.decoder.dtype).max
    return replace(maps, decoder=decoder.clamp(-limit, limit).to(maps.decoder.dtype), mean=mean.float())


def _fitted(codes: Tensor, x: Tensor, encoder: Tensor, covariance: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's decoder [R, w] of least squares, and what is to be added to its mean, [w].

    codes: [n_samples, R], in units of the components; x: [n_samples, w], what they are of; covariance: of all tokens;
    before: what the decoder leans on. The fewer the samples, the less they say beyond z = E x.
    """
    n, width = x.shape
    error = codes - x @ encoder.T
    mean = error.mean(0)
    known = x.T @ x / n + width / n * covariance
    known += (_TINY * known.diagonal().mean() + _LEAST) * torch.eye(width, device=x.device)
    matrix = encoder + torch.linalg.solve(known, x.T @ (error - mean) / n).T
    noise = codes - mean - x @ matrix.T
    wanted = matrix @ covariance
    gram = wanted @ matrix.T + noise.T @ noise / n
    lean = _LEAN * gram.diagonal() + _LEAST
    decoder = torch.linalg.solve(gram + lean.diag(), wanted + lean[:, None] * before)
    return decoder, -mean @ decoder  # codes of the mean token stand for the mean
