"""RoPE of an exported model: the model's own where heads stay as they are, a baked list of frequencies elsewhere.

Stock loaders take an arbitrary list as `longrope` with rope_theta 1 and factors 1 / inv_freq: with theta 1 a loader
that drops the factors fails loudly instead of silently. A factor of 1e30 is a zero frequency: no rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.model.model_spec import ModelSpec

#: The factor of a channel pair that is not rotated.
NO_ROTATION = 1e30


@dataclass(frozen=True)
class Positions:
    """RoPE as an engine gets it. `factors` [D / 2] float64 divide theta^(-2i/D); None means the model's own config.

    `score_scale` is what RoPE would have multiplied scores by (yarn's attention factor squared), now in the queries.
    """

    own: dict[str, Any]
    inv_freq: Tensor
    factors: Tensor | None
    score_scale: float
    max_positions: int

    def hf_fields(self) -> dict[str, Any]:
        """Return the config fields, in the newer and the older spelling."""
        if self.factors is None:
            older = {k: v for k, v in self.own.items() if k != "rope_theta"}
            scaling = None if self.own.get("rope_type", "default") == "default" else older
            return {
                "rope_parameters": self.own,
                "rope_theta": self.own.get("rope_theta", 10000.0),
                "rope_scaling": scaling,
            }
        factors = [float(f) for f in self.factors]
        scaling = {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": self.max_positions,
        }
        return {
            "rope_parameters": {"rope_theta": 1.0, **scaling},
            "rope_theta": 1.0,
            "rope_scaling": scaling,
            "original_max_position_embeddings": self.max_positions,
        }

    def gguf_base_and_factors(self) -> tuple[float, Tensor | None]:
        """Return (freq_base, rope_freqs [D / 2] float32 or None): angle = position * base^(-2i/D) / factor."""
        if self.factors is not None:
            return 1.0, self.factors.float()
        base = float(self.own.get("rope_theta", 10000.0))
        n = len(self.inv_freq)
        default = base ** (-torch.arange(n, dtype=torch.float64) / n)
        factors = default / self.inv_freq.double()
        plain = self.own.get("rope_type", "default") == "default"
        return base, None if plain else factors.float()


def export_positions(config: Any, spec: ModelSpec, n_virtual: int, *, scaled_by_engine: bool = True) -> Positions:
    """Return RoPE for heads that hold `n_virtual` copies of every frequency.

    config: the transformers config of the original. With one copy and full rotary nothing changes, unless the
    engine does not apply the attention factor itself (`scaled_by_engine`), which then moves into the queries.
    """
    inv_freq, scale = own_frequencies(config)
    attention = spec.layers[0]
    own = dict(config.rope_parameters or {})
    positions = int(config.max_position_embeddings)
    if n_virtual == 1 and attention.rotary_dim == attention.head_dim:
        return Positions(own, inv_freq, None, 1.0 if scaled_by_engine else scale**2, positions)
    full = torch.zeros(attention.head_dim // 2, dtype=torch.float64)
    full[: len(inv_freq)] = inv_freq.double()
    repeated = full.repeat_interleave(n_virtual)
    factors = torch.where(repeated > 0, 1 / repeated.clamp_min(1e-30), NO_ROTATION)
    return Positions(own, repeated, factors, scale**2, positions)


def own_frequencies(config: Any) -> tuple[Tensor, float]:
    """Return (inv_freq [rotary_dim / 2] float32, attention factor) as transformers computes them for this config."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        embedding = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
    real = type(embedding)(config=config)
    return real.inv_freq.float(), float(real.attention_scaling)
