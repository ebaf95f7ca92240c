"""kv_maps.safetensors: the linear maps of every compressed site.

A site `layers.I.key` or `layers.I.value` has these tensors (n numbers a token, R kept components, B blocks of w):

    .blocks   int32 [B, w]   which of the n numbers each block holds; a partition of 0..n-1
    .encoder  f16/f32 [R, w] z_i = encoder[i] . (x - mean)[blocks[block[i]]]
    .decoder  f16/f32 [R, w] x^[blocks[block[i]]] += z_i * decoder[i]
    .block    int32 [R]      the block of each component
    .bits     uint8 [R]      how many bits a component is stored with
    .mean     f32 [n]        subtracted before encoding; left out where the basis commutes with RoPE

Maps are float16 for 16-bit checkpoints (components are scaled to variance 1, so it holds them with three more
bits than bfloat16) and float32 for float32 ones. Sites that keep everything have no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvcompress.errors import CheckpointError
from kvcompress.model_spec import Site

MAPS_FILE = "kv_maps.safetensors"


@dataclass(frozen=True)
class SiteMaps:
    """The maps of one site; shapes and dtypes as in the file."""

    blocks: Tensor
    encoder: Tensor
    decoder: Tensor
    block: Tensor
    bits: Tensor
    mean: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("blocks", "encoder", "decoder", "block", "bits", "mean")}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def save_maps(maps: dict[Site, SiteMaps], file: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"{site}.{name}": t for site, m in maps.items() for name, t in m._tensors().items()}
    save_file(tensors, file, metadata={"format": "pt"})


def load_maps(directory: Path) -> dict[Site, SiteMaps]:
    """Return the maps of a compressed checkpoint, checked for shape. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / MAPS_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {MAPS_FILE}. Compress again.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}). Compress again.") from error
    maps = {}
    for name in tensors:
        if name.endswith(".encoder"):
            _, layer, part, _ = name.split(".")
            site = Site(int(layer), part)
            try:
                maps[site] = _checked(
                    SiteMaps(
                        blocks=tensors[f"{site}.blocks"].long(),
                        encoder=tensors[f"{site}.encoder"],
                        decoder=tensors[f"{site}.decoder"],
                        block=tensors[f"{site}.block"].long(),
                        bits=tensors[f"{site}.bits"],
                        mean=tensors.get(f"{site}.mean"),
                    )
                )
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"{file}: maps of {site} incomplete ({error}). Compress again.") from error
    return maps


def _checked(maps: SiteMaps) -> SiteMaps:
    n_components, width = maps.encoder.shape
    n_blocks = maps.blocks.shape[0]
    if maps.decoder.shape != (n_components, width) or maps.block.shape != (n_components,):
        raise ValueError("encoder, decoder and block differ in size")
    if maps.blocks.shape[1] != width or not torch.equal(
        maps.blocks.flatten().sort()[0], torch.arange(n_blocks * width)
    ):
        raise ValueError("blocks are not a partition")
    if n_components and not 0 <= int(maps.block.min()) <= int(maps.block.max()) < n_blocks:
        raise ValueError("a component names a block that does not exist")
    return maps
