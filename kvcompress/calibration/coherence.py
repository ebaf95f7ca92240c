"""How much more an error costs than its tokens do one by one: what predicted losses leave out.

F and C take tokens as independent: 1/2 sum_t E[(g_t . e_t)^2]. A query reads many tokens at once, and dropping a
component makes errors of neighbouring tokens alike, so that they add up: 1/2 E[(sum_t g_t . e_t)^2] over the tokens of
a window. The ratio of the two, a component's coherence, is measured here in a second, short pass. On SmolLM2 it is
about 2 for keys and 4 for values (docs/measurements.md). Errors of quantising are nearly independent: of those at
distortion c only a part c follows the component (see choose.bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvcompress.calibration.moments import Moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.model import blocks
from kvcompress.model.model_spec import ModelSpec, Site
from kvcompress.side_by_side import side_by_side
from kvcompress.whitening import whitened_eigenbasis

#: Of the calibration's windows every fourth is read again, at most this many.
_SHARE, _MOST_WINDOWS = 4, 8
#: A ratio of one window is as uncertain as a chi-squared number with one degree of freedom; so many are averaged, over
#: windows and over components of neighbouring rank.
_AVERAGED = 256


class Watch(SiteMoments):
    """Sums, over windows, of the ratio for each component of a site; its components are those of single heads."""

    def __init__(self, made_of: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        """made_of: shift [n], the mean; heads [n_heads, head_dim], the numbers of each; encoder and decoder as
        whitened_eigenbasis returns them, float32; order of all components, energies falling. device: where tokens come.
        """
        shift, heads, encoder, decoder, order = made_of
        super().__init__([], shift, [], [], shift[None, :0])
        self.heads, self.shift, self.order = heads.to(device), shift.to(device), order
        self.encoder, self.decoder = encoder.to(device), decoder.to(device)
        self.ratios = torch.zeros(encoder.shape[:2], dtype=torch.float64, device=device)
        self.n_windows = 0

    @classmethod
    def of(cls, sums: SiteMoments, heads: Tensor, device: torch.device | str = "cpu") -> Watch:
        """Return the watch of a site's components; sums and heads on the CPU."""
        covariance, fisher = sums.covariance(heads, centred=True), sums.fisher_information(heads)
        energy, encoder, decoder = whitened_eigenbasis(covariance, fisher)
        order = energy.flatten().argsort(descending=True, stable=True)
        return cls((sums.mean.float(), heads, encoder.float(), decoder.float(), order), device)

    def arrays(self) -> tuple[Any, ...]:
        """Return what it is made of, as NumPy's arrays, to be made again in another process."""
        made_of = (self.shift, self.heads, self.encoder, self.decoder, self.order)
        return tuple(t.cpu().numpy() for t in made_of)

    def add(
        self, x: Tensor, g: Tensor, weight: Tensor | None = None, *, n_samples: int = 0, n_weighed: int = 0
    ) -> None:
        """Add a window: x, g [n_tokens, n], as SiteMoments.add takes them."""
        x, g = x.to(self.shift), g.to(self.shift)
        z = (x - self.shift)[:, self.heads].transpose(0, 1) @ self.encoder.transpose(
            1, 2
        )  # [n_heads, n_tokens, components]
        losses = z * (g[:, self.heads].transpose(0, 1) @ self.decoder)
        self.ratios += losses.sum(1).square() / losses.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        self.n_tokens += len(x)
        self.n_windows += 1

    def to(self, device: str) -> SiteMoments:
        """Return itself: tokens come to where it is."""
        return self

    def add_ratios(self, ratios: Tensor, n_windows: int) -> None:
        """Add what another watch of the same components has of other windows."""
        self.ratios += ratios.to(self.ratios.device)
        self.n_windows += n_windows

    def by_rank(self) -> Tensor:
        """Return the coherence of components, energies falling, averaged over neighbours, at least 1: [n]."""
        ratios = (self.ratios.cpu() / self.n_windows).flatten()[self.order]
        width = min(len(ratios), _AVERAGED // self.n_windows) | 1  # odd
        padded = functional.pad(ratios[None, None], (width // 2, width // 2), mode="replicate")
        return functional.avg_pool1d(padded, width, 1)[0, 0].clamp_min(1)


def coherence_windows(windows: Tensor) -> Tensor:
    """Return those of the calibration's windows that are read again."""
    n = min(_MOST_WINDOWS, -(-len(windows) // _SHARE))
    return windows[torch.linspace(0, len(windows) - 1, n).round().long()]


def watches_of(spec: ModelSpec, moments: Moments, device: torch.device | str = "cpu") -> Moments:
    """Return, for every site of `moments`, what sums the coherence of its components; tokens come to `device`."""

    def watch(site: Site) -> SiteMoments:
        return Watch.of(moments.sites[site].to("cpu"), blocks.head_groups(spec.attention(site), 1), device)

    made = side_by_side(watch, list(moments.sites), width=max(map(spec.width, moments.sites)))
    return Moments(dict(zip(moments.sites, made, strict=True)))


def measure_coherence(
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    collect: Callable[..., Moments],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Leave in the sites of `moments` the coherence of their components, by rank.

    windows: those that the moments are of; a quarter of them is read again, with other labels. collect: the pass, as
    collect_moments without its model. device: where tokens come. Other arguments: as collect_moments'.
    """
    watched = watches_of(spec, moments, device)
    collect(spec, coherence_windows(windows), watched, sinks=sinks, recent=recent, seed=seed + 1, progress=progress)
    for site, watch in watched.sites.items():
        assert isinstance(watch, Watch)
        moments.sites[site].coherence = watch.by_rank().to(moments.sites[site].total.device)
