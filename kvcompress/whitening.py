"""The whitened eigenproblem: the components that cost most to drop, from C and F."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.errors import CalibrationError

#: Ridge on F, as a share of its mean diagonal: keeps F^{-1/2} bounded in directions the text never used.
FISHER_RIDGE = 1e-2
#: Components with less than this share of the largest variance keep their scale instead of being blown up to 1.
_VARIANCE_FLOOR = 1e-8
#: No encoder entry grows beyond about this, so that float16 maps hold it even where the variance is 0.
_ENCODER_LIMIT = 1e3


def whitened_eigenbasis(covariance: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (energy, encoder, decoder) of F^{1/2} C F^{1/2} = U L U^T, per block (docs/how-it-works.md).

    covariance, fisher: [n_blocks, width, width], real symmetric or complex Hermitian. energy: [n_blocks, width],
    l_i, descending. encoder rows and decoder columns are scaled so that every component has variance 1, which
    lets 16-bit storage hold any of them. encoder: [n_blocks, component, width], decoder: [n_blocks, width, component].
    Raises CalibrationError for moments that no text gives.
    """
    mean_diagonal = fisher.diagonal(dim1=1, dim2=2).real.mean(1)
    ridge = (FISHER_RIDGE * mean_diagonal).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(fisher.shape[1], dtype=fisher.dtype, device=fisher.device)
    values, vectors = _eigh(fisher + ridge[:, None, None] * identity)
    values = values.clamp_min(0).sqrt().clamp_min(ridge[:, None].sqrt() * 0.5)
    root = (vectors * values.unsqueeze(1)) @ vectors.mH
    inverse_root = (vectors / values.unsqueeze(1)) @ vectors.mH
    whitened = root @ covariance @ root
    energy, u = _eigh((whitened + whitened.mH) / 2)
    energy, u = energy.flip(1).clamp_min(0), u.flip(2)
    floor = (_VARIANCE_FLOOR * energy[:, :1]).maximum((values.amax(1, keepdim=True) / _ENCODER_LIMIT).square())
    deviation = energy.maximum(floor).sqrt()
    encoder = (u / deviation.unsqueeze(1)).mH @ root
    decoder = inverse_root @ (u * deviation.unsqueeze(1))
    return energy, encoder, decoder


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # public, but not in its __all__
        raise CalibrationError(
            "the moments have no eigenvalues that can be computed: their numbers are damaged. Delete the moments file "
            "and calibrate again."
        ) from error
    return values, vectors
