"""RoPE as models apply it, recomputed so that keys can be un-rotated."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import CheckpointError
from kvcompress.model.rotation import Rotation


class Rotary:
    """RoPE of a site, in float32."""

    def __init__(self, inv_freq: Tensor, scale: float, *, start: int = 0, interleaved: bool = False) -> None:
        """inv_freq: [rotary_dim / 2]; the others as in Rotation."""
        self.inv_freq, self.scale = inv_freq.float(), scale
        self.start, self.interleaved = start, interleaved

    @classmethod
    @lru_cache(maxsize=8)  # asked for by every layer of every window
    def by(cls, rotation: Rotation, device: torch.device | str = "cpu") -> Rotary:
        """Return RoPE as it was proven on the loaded model."""
        frequencies = torch.tensor(rotation.frequencies, device=device)
        return cls(frequencies, rotation.scale, start=rotation.start, interleaved=rotation.interleaved)

    @classmethod
    def of(cls, model: Any) -> Rotary:
        """Return the RoPE of a transformers model whose layers share one."""
        embedding = model.get_decoder().rotary_emb
        return cls(embedding.inv_freq, float(embedding.attention_scaling))

    @classmethod
    def of_checkpoint(cls, directory: Path) -> Rotary:
        """Return the RoPE of the model that transformers would load from a directory, from its config.json alone."""
        from kvcompress.compat import configuration

        try:
            config = configuration(directory)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"transformers cannot read {directory}: {str(error).splitlines()[0]}") from error
        return cls.of_config(config)

    @classmethod
    def of_config(cls, config: Any) -> Rotary:
        """Return the RoPE of the model that transformers would make of a config."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):  # only to learn which class the model has for it
            embedding = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
        embedding = type(embedding)(config)
        return cls(embedding.inv_freq, float(embedding.attention_scaling))

    def turns_all(self, head_dim: int) -> bool:
        """Return whether it turns whole heads in half-split pairs, the layout that kernels know."""
        return 2 * len(self.inv_freq) == head_dim and not self.interleaved and not self.start

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [batch, n_tokens] -> cos, sin [batch, 1, n_tokens, rotary_dim / 2], without the scale."""
        angles = positions[:, None, :, None].float() * self.inv_freq.to(positions.device)
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [batch, heads, n_tokens, head_dim] before RoPE -> after, float32."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos * self.scale, sin * self.scale)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos / self.scale, -sin / self.scale)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        stop = self.start + 2 * cos.shape[-1]
        turning = x[..., self.start : stop].float()
        pairs = turning.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else turning.chunk(2, -1)
        turned = (pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin)
        whole = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat([x[..., : self.start].float(), whole, x[..., stop:].float()], -1)
