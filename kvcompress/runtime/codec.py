"""Encode and decode the tokens of one site; the reference implementation in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps


class SiteCodec:
    """z = E (x - m) and x^ = m + D z for one site, block by block, computed in float32.

    Components keep the order of the maps file; `n_components` of them are stored for each token in
    `latent_dtype`. Blocks with fewer components than the fullest one are padded with zeros inside the maps.
    """

    def __init__(self, maps: SiteMaps, device: torch.device, latent_dtype: torch.dtype) -> None:
        n_blocks, width = maps.blocks.shape
        block = maps.block.long().cpu()
        counts = torch.bincount(block, minlength=n_blocks)
        slots = int(counts.max()) if len(block) else 0
        # slot of a component among those of its block, in file order
        order = torch.argsort(block, stable=True)
        slot = torch.empty_like(block)
        slot[order] = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block[order]]
        encoder = torch.zeros(n_blocks, slots, width)
        decoder = torch.zeros(n_blocks, slots, width)
        encoder[block, slot] = maps.encoder.float().cpu()
        decoder[block, slot] = maps.decoder.float().cpu()
        place = torch.empty(n_blocks * width, dtype=torch.long)
        place[maps.blocks.flatten().long().cpu()] = torch.arange(n_blocks * width)
        self.n_components = len(block)
        self.latent_dtype = latent_dtype
        self.encoder, self.decoder = encoder.to(device), decoder.to(device)
        self._gather = maps.blocks.flatten().long().to(device)  # blocks' order -> numbers of x
        self._place = place.to(device)  # number of x -> its place in the blocks' order
        self._component = (block * slots + slot).to(device)
        self._shape = (n_blocks, slots, width)
        self.mean = None if maps.mean is None else maps.mean.float().to(device)

    def encode(self, x: Tensor) -> Tensor:
        """x: [..., n] -> [..., n_components] in the latent dtype."""
        x = x.float() if self.mean is None else x.float() - self.mean
        n_blocks, _, width = self._shape
        blocked = x[..., self._gather].unflatten(-1, (n_blocks, width))
        z = torch.einsum("...bw,bsw->...bs", blocked, self.encoder)
        limit = torch.finfo(self.latent_dtype).max  # a token far outside the calibration must not become inf or NaN
        return z.flatten(-2)[..., self._component].clamp(-limit, limit).to(self.latent_dtype)

    def decode_linear(self, z: Tensor) -> Tensor:
        """z: [..., n_components] -> D z [..., n], float32, without the mean."""
        n_blocks, slots, _ = self._shape
        padded = torch.zeros(*z.shape[:-1], n_blocks * slots, device=z.device)
        padded[..., self._component] = z.float()
        x = torch.einsum("...bs,bsw->...bw", padded.unflatten(-1, (n_blocks, slots)), self.decoder)
        return x.flatten(-2)[..., self._place]

    def decode(self, z: Tensor) -> Tensor:
        """z: [..., n_components] -> x^ [..., n], float32."""
        x = self.decode_linear(z)
        return x if self.mean is None else x + self.mean
