"""Sums of a site that were read from a file: each thing that can be wrong with them is refused for itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.model.model_spec import Site


def sound() -> SiteMoments:
    """Three tokens of six numbers, kept for one block and for two."""
    moments = SiteMoments.empty([torch.arange(6).view(1, 6), torch.arange(6).view(2, 3)], 6)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    moments.add(x, g, torch.tensor([0.5, 1, 1.5], dtype=torch.float64), n_samples=2, n_weighed=2)
    moments.coherence = torch.linspace(2, 1, 6, dtype=torch.float64)
    return moments


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor], index: int | None = None) -> Callable[..., None]:
    def damage(moments: SiteMoments) -> None:
        if index is None:
            setattr(moments, name, change(getattr(moments, name)))
        else:
            getattr(moments, name)[index] = change(getattr(moments, name)[index])

    return damage


DAMAGE: dict[str, tuple[Callable[[SiteMoments], None], str]] = {
    "total of two dimensions": (changed("total", lambda t: t[None]), "its samples not"),
    "samples of another width": (changed("samples", lambda t: t[:, 1:]), "its samples not"),
    "samples of one dimension": (changed("samples", lambda t: t[0]), "its samples not"),
    "no token": (lambda m: setattr(m, "n_tokens", 0), "0 tokens"),
    "no blocks": (lambda m: [t.clear() for t in (m.partitions, m.outer, m.fisher)] and None, "has no blocks"),
    "blocks that share a number": (changed("partitions", torch.zeros_like, 1), "no partition"),
    "blocks of one dimension": (changed("partitions", lambda t: t.flatten(), 0), "no partition"),
    "sums of other blocks": (changed("outer", lambda t: t[:, 1:], 1), "its blocks [2, 3, 3]"),
    "Fisher sums of other blocks": (changed("fisher", lambda t: t[:1], 1), "its blocks [2, 3, 3]"),
    "weighed sums of other blocks": (changed("weighed_outer", lambda t: t[:1], 1), "weighed sums"),
    "a weighed total of another width": (changed("weighed_total", lambda t: t[1:]), "weighed sums"),
    "weighed samples of another width": (changed("weighed_samples", lambda t: t[:, 1:]), "weighed sums"),
    "coherence of another width": (changed("coherence", lambda t: t[1:]), "coherence"),
    "coherence below one": (changed("coherence", lambda t: t - 0.5), "coherence"),
    "a sum that is not finite": (changed("fisher", lambda t: t * torch.inf, 0), "no finite float64"),
    "a sample that is not finite": (changed("samples", lambda t: t * torch.nan), "no finite float64"),
    "sums in 32 bits": (changed("total", torch.Tensor.float), "no finite float64"),
    "samples in 64 bits": (changed("weighed_samples", torch.Tensor.double), "its samples no float32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_together_is_refused(damage: str) -> None:
    moments, (spoil, words) = sound(), DAMAGE[damage]
    moments.check(Site(3, "key"))
    spoil(moments)
    with pytest.raises(ValueError, match=r"layers\.3\.key") as error:
        moments.check(Site(3, "key"))
    assert words in str(error.value)
