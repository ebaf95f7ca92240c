"""What a site becomes: its line of the plan, its maps, and what these see of typical text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.choose.allocation import Choice
from kvcompress.choose.fitting import FittedSite
from kvcompress.choose.refit import refitted
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.distance import seen_of_samples
from kvcompress.model.model_spec import Site
from kvcompress.site_plan import SitePlan, runs

#: Tokens of each site of which it is told how far typical text is from what was calibrated on.
_TYPICAL_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class CodedSite:
    """A site's line of the plan, its maps (None where it is kept whole), its energies, and for `codec.distance` what
    is seen of the calibration text."""

    plan: SitePlan
    maps: SiteMaps | None
    energy: list[float]
    seen: list[Any]


def coded_site(
    site: Site,
    choice: Choice,
    fit: FittedSite,
    moments: SiteMoments,
    *,
    turn: int,
    refits: bool,
    device: str = "cpu",
) -> CodedSite:
    """Return what a site becomes. turn: tokens of a turn of keys. refits: whether decoders are fitted to codes.

    device: where that is computed, and where samples are encoded.

    Keys that are encoded after RoPE are not refitted: they have any phase, samples only theirs.
    """
    plan, energy = _site_plan(site, choice, fit, turn), fit.energy.tolist()
    if plan.exact:
        return CodedSite(plan, None, energy, [])
    maps = _site_maps(fit, choice, moments)
    if refits and not fit.rotated:
        maps = refitted(maps, moments, device=device)
    return CodedSite(plan, maps, energy, _seen(fit, maps, moments, device))


def _site_plan(site: Site, choice: Choice, fit: FittedSite, turn: int) -> SitePlan:
    plan = SitePlan(
        layer=site.layer,
        part=site.part,
        basis=fit.name,
        width=fit.blocks.numel(),
        bits=tuple((bits, last - first) for bits, first, last in runs(choice.bits.tolist())),
        predicted_loss=choice.predicted_loss,
        block_width=fit.blocks.shape[1],
        rotated=fit.rotated,
    )
    return replace(plan, turn=turn) if site.part == "key" and not (plan.rotated or plan.exact) else plan


def _site_maps(fit: FittedSite, choice: Choice, moments: SiteMoments) -> SiteMaps:
    """Return the maps in their storage dtype; rows too large for float16 move their scale into the decoder."""
    components, bits = choice.components, choice.bits
    dtype = torch.float32 if bool((bits == 32).any()) else torch.float16
    scale = (components.encoder.abs().amax(1, keepdim=True) / (torch.finfo(torch.float16).max / 2)).clamp_min(1.0)
    return SiteMaps(
        blocks=fit.blocks.int(),
        encoder=(components.encoder / scale).to(dtype),
        decoder=(components.decoder * scale).to(dtype),
        block=components.block.int(),
        bits=bits,
        step=torch.where(bits < 16, choice.step / scale[:, 0].float(), 1.0),
        mean=moments.mean.float() if fit.centred else None,
    )


def _seen(fit: FittedSite, own: SiteMaps, moments: SiteMoments, device: str) -> list[Any]:
    """Return what tells how far typical text is: the calibration text's own tokens, as a site's codec encodes them.

    Keys that are encoded after RoPE are left out, and so is everything where there are no samples.
    """
    samples = moments.samples if moments.typical is None else moments.typical
    if not len(samples) or own.mean is None or fit.rotated:
        return []
    some = samples[:: -(-len(samples) // _TYPICAL_SAMPLES)] - own.mean
    return seen_of_samples(SiteCodec(own, torch.device(device)), some.to(device))
