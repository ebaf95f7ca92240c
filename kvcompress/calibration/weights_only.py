"""Moments of the weights alone, for compression without any text: C = W W^T, F = I."""

from __future__ import annotations

import torch

from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import UnsupportedModelError
from kvcompress.model.model_spec import Site
from kvcompress.model.rope import Rotary
from kvcompress.model.rotation import Rotation


def weight_moments(checkpoint: Checkpoint, *, group: int, band: int = 16) -> Moments:
    """Return data-free moments: C = W W^T, m = bias, F = I, as in the paper's SVD of the projections.

    Raises UnsupportedModelError for key norms, where keys are no linear image of the hidden state.
    """
    if any(a.key_norm for a in checkpoint.spec.layers):
        raise UnsupportedModelError(
            "--no-calibration needs keys that are linear in the hidden state; this model normalises its keys. "
            "Calibrate on text instead."
        )
    moments = empty_moments(checkpoint.spec, {"mode": "weights"}, group=group, band=band)
    moments.rotations = rotations_of_config(checkpoint)
    for site, sums in moments.sites.items():
        weight, bias = checkpoint.site_weight(site)
        sums.add(weight.T, torch.zeros_like(weight.T))
        sums.n_tokens = 1
        sums.total = torch.zeros_like(sums.total) if bias is None else bias
        for partition, outer, fisher in zip(sums.partitions, sums.outer, sums.fisher, strict=True):
            fisher += torch.eye(partition.shape[1], dtype=torch.float64)
            if bias is not None:
                b = bias[partition]
                outer += b.unsqueeze(2) * b.unsqueeze(1)
    return moments


def rotations_of_config(checkpoint: Checkpoint) -> dict[Site, Rotation]:
    """Return the rotations that a known family's config.json describes, with no model loaded to prove them on."""
    turning = [a for a in checkpoint.spec.layers if a.rotary_dim]
    if not turning:
        return {}
    rotary = Rotary.of_checkpoint(checkpoint.path)
    rotation = Rotation(tuple(rotary.inv_freq.tolist()), scale=rotary.scale)
    return {Site(a.layer, "key"): rotation for a in turning}
