"""`band`: free mixing inside bands of neighbouring RoPE frequencies, across all heads.

Neighbouring frequencies turn nearly together, so keys of one band keep their structure before RoPE, and a
block is only n_kv_heads * band wide: cheap to rebuild on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from kvcompress.bases.latent import Latent
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec


class Band(Latent):
    name = "band"
    parts = ("key",)

    def __init__(self, channels: int = 16) -> None:
        """channels: channels of each head in a band (two for each RoPE frequency)."""
        super().__init__()
        self.channels = channels

    def blocks(self, attention: AttentionSpec) -> Tensor:
        return blocks.bands(attention, min(self.channels, attention.head_dim))
