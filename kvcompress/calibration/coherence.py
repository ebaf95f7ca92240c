"""How much more an error costs than its tokens do one by one: what predicted losses leave out.

F and C take tokens as independent: 1/2 sum_t E[(g_t . e_t)^2]. A query reads many tokens at once, and dropping a
component makes errors of neighbouring tokens alike, so that they add up: 1/2 E[(sum_t g_t . e_t)^2] over the tokens of
a window. The ratio of the two, a component's coherence, is measured here in a second, short pass. On SmolLM2 it is
about 2 for keys and 4 for values (docs/measurements.md). Errors of quantising are nearly independent: of those at
distortion c only a part c follows the component (see choose.bits).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, SiteMoments
from kvcompress.model import blocks
from kvcompress.model.model_spec import ModelSpec
from kvcompress.whitening import whitened_eigenbasis

#: Of the calibration's windows every fourth is read again, at most this many.
_SHARE, _MOST_WINDOWS = 4, 8
#: A ratio of one window is as uncertain as a chi-squared number with one degree of freedom; so many are averaged, over
#: windows and over components of neighbouring rank.
_AVERAGED = 256


class _Watch(SiteMoments):
    """Sums, over windows, of the ratio for each component of a site; its components are those of single heads."""

    def __init__(self, sums: SiteMoments, heads: Tensor, device: torch.device | str = "cpu") -> None:
        """heads: [n_heads, head_dim], the numbers of each; sums and heads on the CPU. device: where tokens come."""
        super().__init__([], sums.total, [], [], sums.samples)
        covariance, fisher = sums.covariance(heads, centred=True), sums.fisher_information(heads)
        energy, encoder, decoder = whitened_eigenbasis(covariance, fisher)
        self.heads, self.shift = heads.to(device), sums.mean.float().to(device)
        self.encoder, self.decoder = encoder.transpose(1, 2).float().to(device), decoder.float().to(device)
        self.order = energy.flatten().argsort(descending=True, stable=True)
        self.ratios = torch.zeros(energy.shape, dtype=torch.float64, device=device)
        self.n_windows = 0

    def add(self, x: Tensor, g: Tensor, *, n_samples: int = 0) -> None:
        """Add a window: x, g [n_tokens, n], as SiteMoments.add takes them."""
        x, g = x.to(self.shift), g.to(self.shift)
        z = (x - self.shift)[:, self.heads].transpose(0, 1) @ self.encoder  # [n_heads, n_tokens, components]
        losses = z * (g[:, self.heads].transpose(0, 1) @ self.decoder)
        self.ratios += losses.sum(1).square() / losses.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        self.n_tokens += len(x)
        self.n_windows += 1

    def to(self, device: str) -> SiteMoments:
        """Return itself: tokens come to where it is."""
        return self

    def by_rank(self) -> Tensor:
        """Return the coherence of components, energies falling, averaged over neighbours, at least 1: [n]."""
        ratios = (self.ratios.cpu() / self.n_windows).flatten()[self.order]
        width = min(len(ratios), _AVERAGED // self.n_windows) | 1  # odd
        padded = functional.pad(ratios[None, None], (width // 2, width // 2), mode="replicate")
        return functional.avg_pool1d(padded, width, 1)[0, 0].clamp_min(1)


def measure_coherence(
    model: Any,
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    collect: Callable[..., Moments] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Leave in the sites of `moments` the coherence of their components, by rank. Other arguments: as collect_moments'.

    windows: those that the moments are of; a quarter of them is read again, with other labels. collect: the pass, as
    collect_moments without its model; that of the whole model by default.
    """
    n = min(_MOST_WINDOWS, -(-len(windows) // _SHARE))
    chosen = windows[torch.linspace(0, len(windows) - 1, n).round().long()]
    device = next(model.parameters()).device
    watches: dict[Any, SiteMoments] = {}
    for site, sums in moments.sites.items():
        watches[site] = _Watch(sums.to("cpu"), blocks.head_groups(spec.attention(site), 1), device)
    watched = Moments(watches)
    collect = collect or partial(collect_moments, model)
    collect(spec, chosen, watched, sinks=sinks, recent=recent, seed=seed + 1, progress=progress)
    for site, watch in watches.items():
        assert isinstance(watch, _Watch)
        moments.sites[site].coherence = watch.by_rank().to(moments.sites[site].total.device)
