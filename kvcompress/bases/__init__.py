"""Bases: how a site's numbers are mixed into components, from the most restricted to the freest."""

from kvcompress.bases.band import Band
from kvcompress.bases.base import Basis, Components, FittedBasis
from kvcompress.bases.frequency import Frequency
from kvcompress.bases.head import Head
from kvcompress.bases.latent import Latent, PerHead
from kvcompress.bases.share import Share

BASES: dict[str, type[Basis]] = {
    "head": Head,
    "share": Share,
    "frequency": Frequency,
    "band": Band,
    "per_head": PerHead,
    "latent": Latent,
}

__all__ = ["BASES", "Band", "Basis", "Components", "FittedBasis", "Frequency", "Head", "Latent", "PerHead", "Share"]
