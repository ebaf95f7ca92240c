"""RoPE as the supported families apply it (half-split pairs), recomputed so that keys can be un-rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import CheckpointError


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Rotary:
    """RoPE of a model, in float32 from the model's own frequencies."""

    def __init__(self, inv_freq: Tensor, scale: float) -> None:
        """inv_freq: [rotary_dim / 2]; scale: the attention factor by which the model multiplies cos and sin."""
        self.inv_freq, self.scale = inv_freq.float(), scale

    @classmethod
    def of(cls, model: Any) -> Rotary:
        """Return the RoPE of a transformers model."""
        embedding = model.get_decoder().rotary_emb
        return cls(embedding.inv_freq, float(embedding.attention_scaling))

    @classmethod
    def of_checkpoint(cls, directory: Path) -> Rotary:
        """Return the RoPE of the model that transformers would load from a directory, from its config.json alone."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(directory)
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

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [batch, n_tokens] -> cos, sin [batch, 1, n_tokens, rotary_dim], without the scale."""
        angles = positions[:, None, :, None].float() * self.inv_freq.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [batch, heads, n_tokens, head_dim] before RoPE -> after, float32."""
        cos, sin = self.cos_sin(positions)
        rotated, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :].float()
        return torch.cat([(rotated * cos + rotate_half(rotated) * sin) * self.scale, rest], -1)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.cos_sin(positions)
        rotated, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :].float()
        return torch.cat([(rotated * cos - rotate_half(rotated) * sin) / self.scale, rest], -1)
