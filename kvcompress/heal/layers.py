"""What one layer's attention sees of its keys and values while maps are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.heal.site import Shape, TrainableSite
from kvcompress.model.model_spec import PARTS, Part
from kvcompress.site_plan import SitePlan


class TrainableLayer(nn.Module):
    """One layer's sites with trainable maps; None for a part that the cache keeps exactly."""

    key: TrainableSite | None
    value: TrainableSite | None

    def __init__(
        self,
        codecs: Any,
        plans: dict[Part, SitePlan],
        maps: dict[Part, SiteMaps | None],
    ) -> None:
        """codecs: the run time's LayerCodecs, which knows how keys are rotated; plans, maps: by part."""
        super().__init__()
        self.n_kv_heads, self.head_dim = codecs.n_kv_heads, codecs.head_dim
        self.rotary, self.cached_rotated, self.turn = codecs.rotary, codecs.cached_rotated, codecs.turn
        for part in PARTS:
            found = maps[part]
            shape = decoder_shape(plans[part].basis, part, folded=found is not None and found.mean is None)
            site = None if found is None else TrainableSite(found, head_dim=self.head_dim, shape=shape)
            setattr(self, part, site)

    def seen_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """keys: [batch, heads, n_tokens, head_dim] after RoPE -> the same once encoded, float32 at least.

        positions: [batch, n_tokens], those of the tokens.
        """
        if self.key is None:
            return keys
        positions = positions // self.turn * self.turn
        mean = self.key.current_mean()
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        if self.cached_rotated and self.rotary is not None:
            turned = self._turned_mean(mean, positions)
            return self._heads(self.key(self._flat(wide - turned))) + turned
        x = wide if self.rotary is None else self.rotary.unrotate(wide, positions)
        seen = self._heads(self._through(self.key, self._flat(x), mean))
        return seen if self.rotary is None else self.rotary.rotate(seen, positions)

    def seen_values(self, values: Tensor) -> Tensor:
        if self.value is None:
            return values
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return self._heads(self._through(self.value, self._flat(wide), self.value.current_mean()))

    def expanded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all KV heads from virtual heads [batch, virtual heads, n_tokens, head_dim]."""
        full_keys = keys if self.key is None else self._heads(self.key.decode(self._flat(keys).float())).to(keys.dtype)
        if self.value is None:
            return full_keys, values
        return full_keys, self._heads(self.value.decode(self._flat(values).float())).to(values.dtype)

    def _through(self, site: TrainableSite, x: Tensor, mean: Tensor | None) -> Tensor:
        return site(x) if mean is None else site(x - mean) + mean

    def _turned_mean(self, mean: Tensor | None, positions: Tensor) -> Tensor:
        if mean is None:
            return torch.zeros((), device=positions.device)
        heads = mean.view(1, self.n_kv_heads, 1, self.head_dim)
        return self.rotary.rotate(heads.expand(len(positions), -1, positions.shape[1], -1), positions)

    def _flat(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2)


def decoder_shape(basis: str, part: str, *, folded: bool) -> Shape:
    """Return what a site's decoders must stay, so that its output is still what its basis says."""
    if not folded:
        return "free"  # decoded before RoPE, or in the rotated space as the run time does
    if basis == "share":
        return "fixed"
    if basis == "head":
        return "channels"
    return "complex" if part == "key" else "free"
