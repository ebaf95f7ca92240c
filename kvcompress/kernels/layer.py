"""A layer's codecs with the kernels at their service: used by themselves on a GPU, the reference everywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.layer import LayerCodecs
from kvcompress.kernels.launch_shapes import UNIT_TOKENS
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.site import GroupedMaps, SiteKernels, whole_rotation
from kvcompress.kernels.turned import applies


@dataclass(frozen=True)
class LayerKernels(LayerCodecs):
    """LayerCodecs that pack by kernels where those apply; what they need of each codec is kept here."""

    @cached_property
    def key_site(self) -> SiteKernels | None:
        return None if self.key is None else SiteKernels(self.key, self.n_kv_heads)

    @cached_property
    def value_site(self) -> SiteKernels | None:
        return None if self.value is None else SiteKernels(self.value, self.value_shape[0])

    def turned_maps(self, n_heads: int, device: torch.device) -> tuple[GroupedMaps, GroupedMaps] | None:
        """Return what decoding keys in turns needs of keys and values, None where its kernels take no such layer."""
        if self.turn == 1 or self.turn % UNIT_TOKENS or self.key_site is None or self.value_site is None:
            return None
        if self.rotary is None or not whole_rotation(self.rotary, self.head_dim) or not compiler_works(device):
            return None
        keys, values = self.key_site.grouped, self.value_site.grouped
        if keys is None or values is None:
            return None
        if not applies(n_heads, self.n_kv_heads, self.head_dim, keys.layout, values.layout, device):
            return None
        return keys, values

    def pack_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        packed = None
        if self.key_site is not None and not self.cached_rotated:
            packed = self.key_site.pack_heads(keys, self.rotary, positions)
        return super().pack_keys(keys, positions) if packed is None else packed

    def pack_values(self, values: Tensor, positions: Tensor | None = None) -> Tensor:
        packed = None
        if self.value_site is not None:
            packed = self.value_site.pack_heads(values, self.value_rotary, positions)
        return super().pack_values(values, positions) if packed is None else packed

    def pack(self, codec: SiteCodec | None, x: Tensor) -> Tensor:
        site = self.key_site if codec is self.key else self.value_site
        packed = None if codec is None or site is None else site.pack(x)
        return super().pack(codec, x) if packed is None else packed
