"""`frequency`: complex mixing of heads, one matrix for each RoPE frequency; commutes with RoPE exactly.

RoPE multiplies channel pair j of every head by the same phase, so exactly the complex-linear maps of the
vector (head 0 pair j, head 1 pair j, ...) commute with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.bases.base import Basis, Components, FittedBasis, RankedComponents
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec
from kvcompress.whitening import whitened_eigenbasis


class Frequency(Basis):
    name = "frequency"
    commutes_with_rope = True

    def __init__(self, *, whole_heads: bool = False) -> None:
        """whole_heads: keep the same rank at every frequency, so that what is cached is whole virtual heads."""
        self.whole_heads = whole_heads

    def blocks(self, attention: AttentionSpec) -> Tensor:
        return blocks.frequencies(attention)

    def fit(self, covariance: Tensor, fisher: Tensor) -> FittedBasis:
        """The Hermitian moments are the parts of C and F that RoPE's phase leaves alone."""
        energy, encoder, decoder = whitened_eigenbasis(hermitian(covariance), hermitian(fisher))
        # 1/2 tr(F C) over the phase average is 1/4 tr(G H) of the complex moments G and H.
        real_encoder = torch.stack(
            [torch.cat([encoder.real, -encoder.imag], -1), torch.cat([encoder.imag, encoder.real], -1)], dim=2
        )
        columns = decoder.transpose(1, 2)
        real_decoder = torch.stack(
            [torch.cat([columns.real, columns.imag], -1), torch.cat([-columns.imag, columns.real], -1)], dim=2
        )
        if self.whole_heads:
            return VirtualHeads(energy / 4, real_encoder, real_decoder)
        return RankedComponents(energy / 4, real_encoder, real_decoder)


def hermitian(moment: Tensor) -> Tensor:
    """Return E[z z^H] of z = re + i im from the real moment of (re, im): [B, 2H, 2H] -> [B, H, H] complex."""
    h = moment.shape[1] // 2
    re_re, re_im = moment[:, :h, :h], moment[:, :h, h:]
    im_re, im_im = moment[:, h:, :h], moment[:, h:, h:]
    return torch.complex(re_re + im_im, im_re - re_im)


class VirtualHeads(FittedBasis):
    """Items are virtual heads: the t-th component of every frequency, laid out as RoPE's half-split pairs."""

    def __init__(self, energy: Tensor, encoder: Tensor, decoder: Tensor) -> None:
        """energy: [n_frequencies, H]; encoder, decoder: [n_frequencies, H, 2, 2H]."""
        n_frequencies, n_heads, _, width = encoder.shape
        self.energy = energy.sum(0)
        self.numbers = torch.full((n_heads,), 2 * n_frequencies)
        # [head, re or im, frequency, width]: number c of a virtual head is channel c of a real one.
        self._encoder = encoder.permute(1, 2, 0, 3).reshape(n_heads, -1, width)
        self._decoder = decoder.permute(1, 2, 0, 3).reshape(n_heads, -1, width)
        self._block = torch.arange(n_frequencies).repeat(2)

    def components(self, n_items: int) -> Components:
        return Components(
            self._encoder[:n_items].flatten(0, 1),
            self._decoder[:n_items].flatten(0, 1),
            self._block.repeat(n_items),
        )
