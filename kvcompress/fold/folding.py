"""The folded form: encoders folded into k_proj and v_proj, so that an ordinary cache holds virtual heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.model.model_spec import Site

if TYPE_CHECKING:
    from torch import Tensor


def write_folded_weights(checkpoint: Checkpoint, maps: Mapping[Site, SiteMaps], target: Path) -> None:
    """Write the checkpoint's weight files into `target`, k_proj and v_proj replaced by their encoded rows.

    A site's new weight is E W [rank, hidden] and its bias E b. Files keep their names; one file is in memory at
    a time.
    """
    from safetensors.torch import load_file, save_file

    changed: dict[str, SiteMaps] = {}
    for site, site_maps in maps.items():
        projection = checkpoint.spec.attention(site).projection(site.part)
        changed[projection.weight] = site_maps
        if projection.bias:
            changed[projection.bias] = site_maps
    total = 0
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        tensors = load_file(checkpoint.path / file)
        for name in tensors:
            if name in changed:
                tensors[name] = encode_rows(tensors[name], changed[name])
        save_file(tensors, target / file, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
    index = checkpoint.path / "model.safetensors.index.json"
    if index.is_file():
        document = json.loads(index.read_text())
        document.setdefault("metadata", {})["total_size"] = total
        (target / index.name).write_text(json.dumps(document, indent=2))


def encode_rows(weight: Tensor, maps: SiteMaps) -> Tensor:
    """Return E W for rows of a projection ([n, hidden]) or E b for its bias ([n]), in the tensor's dtype."""
    import torch

    rows = weight.double()[maps.blocks[maps.block]]  # [R, w, ...]
    return torch.einsum("rw,rw...->r...", maps.encoder.double(), rows).to(weight.dtype)
