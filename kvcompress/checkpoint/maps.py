"""kv_maps.safetensors: the linear maps of every compressed site.

A site `layers.I.key` or `layers.I.value` has these tensors (n numbers a token, R kept components, B blocks of w):

    .blocks   int32 [B, w]   which of the n numbers each block holds; a partition of 0..n-1
    .encoder  f16/f32 [R, w] z_i = encoder[i] . (x - mean)[blocks[block[i]]]
    .decoder  f16/f32 [R, w] x^[blocks[block[i]]] += z_i * decoder[i]
    .block    int32 [R]      the block of each component
    .bits     uint8 [R]      how many bits a component is stored with, falling
    .step     f32 [R]        z_i is stored in units of it; 1 where bits is 16 or 32
    .mean     f32 [n]        subtracted before encoding, before RoPE; left out in folded checkpoints

Maps are float16 for 16-bit checkpoints (components are scaled to variance 1, so it holds them with three more
bits than bfloat16) and float32 for float32 ones. Sites that keep everything have no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvcompress.checkpoint.belonging import MAPS_FILE as MAPS_FILE
from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import Site
from kvcompress.options import LEVELS

#: What safetensors takes for a header at most.
_HEADER_BYTES = 100_000_000
_FLOATS = (torch.float16, torch.float32)
#: What each tensor may be stored as.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "blocks": (torch.int32,),
    "block": (torch.int32,),
    "bits": (torch.uint8,),
    "step": (torch.float32,),
}
_DTYPES |= {"encoder": _FLOATS, "decoder": _FLOATS, "mean": (torch.float32,)}
_TENSOR_NAME = re.compile(r"layers\.(\d{1,4})\.(key|value)\.(blocks|encoder|decoder|block|bits|step|mean)")


@dataclass(frozen=True)
class SiteMaps:
    """The maps of one site; shapes and dtypes as in the file."""

    blocks: Tensor
    encoder: Tensor
    decoder: Tensor
    block: Tensor
    bits: Tensor
    step: Tensor
    mean: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            name: getattr(self, name) for name in ("blocks", "encoder", "decoder", "block", "bits", "step", "mean")
        }
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def save_maps(maps: Mapping[Site, SiteMaps], file: Path) -> None:
    """Write the maps of every site as safetensors, tensors named SITE.FIELD (docs/format.md)."""
    from safetensors.torch import save_file

    tensors = {f"{site}.{name}": t for site, m in maps.items() for name, t in m._tensors().items()}
    save_file(tensors, file, metadata={"format": "pt"})


def load_site(file: Path) -> SiteMaps:
    """Return the maps of the one site in a file that `save_maps` wrote in this run, memory-mapped."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        found = {name.rpartition(".")[2]: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return SiteMaps(**({"mean": None} | found))


def load_maps(directory: Path, *, most: int | None = None) -> dict[Site, SiteMaps]:
    """Return the maps of a compressed checkpoint, checked for shape. Raises CheckpointError.

    most: the bytes that the maps can have at most, by the plan; a larger file is refused before it is read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / MAPS_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {MAPS_FILE}. Compress again.")
    if most is not None and file.stat().st_size > most + _HEADER_BYTES:
        raise CheckpointError(
            f"{file} has {file.stat().st_size:,} bytes; by the plan its maps have {most:,} at most. "
            "The files are of different outputs, or damaged: compress again."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}). Compress again.") from error
    sites: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if not match:
            raise CheckpointError(f"{file} holds {name}, which is no part of a site's maps. Compress again.")
        site = Site(int(match[1]), match[2])  # type: ignore[arg-type]
        sites.setdefault(site, {})[match[3]] = tensor
    try:
        return {site: _checked(site, found) for site, found in sorted(sites.items())}
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Compress again.") from error


def _checked(site: Site, found: dict[str, Tensor]) -> SiteMaps:
    """Return the maps of a site. Raises ValueError if its tensors do not fit together."""
    missing = sorted({"blocks", "encoder", "decoder", "block", "bits", "step"} - set(found))
    if missing:
        raise ValueError(f"the maps of {site} have no {missing[0]}")
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES[name]:
            raise ValueError(f"{name} of {site} is stored as {str(tensor.dtype).removeprefix('torch.')}")
    if found["block"].dim() != 1:
        raise ValueError(f"block of {site} has {found['block'].dim()} dimensions, expected 1")
    blocks, block, encoder = found["blocks"].long(), found["block"].long(), found["encoder"]
    if blocks.dim() != 2 or not torch.equal(blocks.flatten().sort()[0], torch.arange(blocks.numel())):
        raise ValueError(f"the blocks of {site} are no partition")
    shapes: dict[str, tuple[int, ...]] = {"encoder": (len(block), blocks.shape[1]), "mean": (blocks.numel(),)}
    shapes |= {"decoder": shapes["encoder"], "bits": (len(block),), "step": (len(block),)}
    for name, shape in shapes.items():
        if name in found and (found[name].shape != shape or not found[name].isfinite().all()):
            raise ValueError(
                f"{name} of {site} has shape {list(found[name].shape)}, expected {list(shape)}, all finite"
            )
    if len(block) and not 0 <= int(block.min()) <= int(block.max()) < len(blocks):
        raise ValueError(f"a component of {site} names a block that does not exist")
    bits = found["bits"].tolist()
    if not set(bits) <= {*LEVELS, 16, 32} or sorted(bits, reverse=True) != bits or not bool((found["step"] > 0).all()):
        raise ValueError(f"the bits of {site} are not among {LEVELS}, 16 and 32 and falling, or a step is not positive")
    return SiteMaps(blocks, encoder, found["decoder"], block, found["bits"], found["step"], found.get("mean"))
