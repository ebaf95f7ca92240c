"""make_plan(): what each site keeps, its maps and the Plan, from moments alone; writes nothing. pipeline.py writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.calibration.at_hand import Elsewhere
from kvcompress.calibration.calibrate import Progress
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.turns import turned_moments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.spilled import SpilledMaps
from kvcompress.choose.allocation import Choice, choose_bits, choose_ranks
from kvcompress.choose.coded import CodedSite, coded_site
from kvcompress.choose.fits import Fits
from kvcompress.choose.fitting import FittedSite
from kvcompress.choose.turning import turns_of
from kvcompress.codec.distance import Distance, distance_of
from kvcompress.errors import BudgetError
from kvcompress.fold.grouping import choose_groups
from kvcompress.model.model_spec import ModelSpec, Site
from kvcompress.model.rotation import Rotation
from kvcompress.options import GROUPED, CompressOptions
from kvcompress.plan import Plan
from kvcompress.side_by_side import fitting_device, side_by_side
from kvcompress.site_plan import SitePlan

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers


def make_plan(
    checkpoint: Checkpoint,
    moments: Moments,
    options: CompressOptions,
    progress: Progress | None = None,
    *,
    workers: Workers | None = None,
    scratch: Path | None = None,
    device: str = "cpu",
    memory: int | None = None,
) -> tuple[Plan, MutableMapping[Site, SiteMaps], dict[Site, list[float]]]:
    """Return the plan, the maps of every site that is not kept whole, and each site's energies, from moments alone.

    workers: who fits sites; threads of this process by default. scratch: a directory for fits and maps that are too
    large to be held together: then one site's are in memory at a time, and each is fitted twice. device: where large
    products are computed, if it has the room. memory: bytes that each of the workers may take of its own.
    """
    spec = checkpoint.spec.turned(moments.rotations)
    checkpoint = replace(checkpoint, spec=spec)
    turns = turns_of(spec, options)
    if max(turns.values()) == 1:
        options = replace(options, turn=1)  # so that components need not come in fours
    device, is_lean = fitting_device(device, spec.max_width), scratch is not None
    if options.metric == "fisher" and options.quantised:
        moments = moments.weighed()
    moments = turned_moments(spec, moments, turns, seed=options.seed, device=device)
    maps: MutableMapping[Site, SiteMaps] = {} if scratch is None else SpilledMaps(scratch)
    how: dict[str, Any] = {"workers": workers, "is_lean": is_lean, "device": device, "memory": memory}
    fitted, chosen = _fitted_and_chosen(checkpoint, moments, options, progress, **how)
    refits = options.metric == "fisher"

    def coded(one: tuple[Site, Choice]) -> CodedSite:
        site, choice = one
        own, turn = (fitted[site], moments.sites[site]), turns.get(site, 1)
        return coded_site(site, choice, *own, turn=turn, refits=refits, device=device)

    made = map(coded, chosen) if is_lean else side_by_side(coded, list(chosen), width=spec.max_width, device=device)
    sites, spectra, seen = [], {}, []
    rotations = _rotations(spec)
    for one in made:
        site = Site(one.plan.layer, one.plan.part)
        turning = spec.rotations.get(site)
        sites.append(replace(one.plan, rotation=None if turning is None else rotations.index(turning)))
        spectra[site] = one.energy
        seen += one.seen
        if one.maps is not None:
            maps[site] = one.maps
    if not any(site.rank for site in sites):
        raise BudgetError(f"keep {options.keep} leaves no room for a single component. Raise --keep.")
    typical = distance_of(seen)
    return _plan_of(checkpoint, moments, options, tuple(sites), maps, typical), maps, spectra


def _plan_of(
    checkpoint: Checkpoint,
    moments: Moments,
    options: CompressOptions,
    sites: tuple[SitePlan, ...],
    maps: Mapping[Site, SiteMaps],
    typical: Distance | None,
) -> Plan:
    """Return the whole plan: its sites, and what must be known of the model, the choices and the calibration."""
    spec = checkpoint.spec
    return Plan(
        form="folded" if options.folded else "coded",
        source=source_name(checkpoint.source),
        source_fingerprint=checkpoint.fingerprint(),
        architecture=spec.architecture,
        dtype=spec.dtype,
        sites=sites,
        sinks=options.sinks,
        recent=options.recent,
        options=options.to_json() | {"maps_only": bool(options.maps_only)},
        calibration=moments.protocol | ({} if typical is None else {"typical": asdict(typical)}),
        loss_in_nats=moments.has_fisher,
        maps_bytes=sum(m.nbytes for m in maps.values()),
        weight_bytes=checkpoint.weight_bytes,
        rotations=_rotations(spec),
        signature=moments.signature,
        own_layers=spec.own_layers,
        window=spec.window,
    )


def _rotations(spec: ModelSpec) -> tuple[Rotation, ...]:
    """Return each rotation of a model once, in the order in which plans number them."""
    return tuple(dict.fromkeys(spec.rotations.values()))


def refit_values(
    model: Callable[[], Any],
    plan: Plan,
    maps: MutableMapping[Site, SiteMaps],
    moments: Moments,
    progress: Progress | None = None,
) -> None:
    """Fit the decoders of values in `maps` to what queries read of them (runtime.value_fit), where text was read.

    model: gives the model that the moments are of, or where it is, None where it is to be left alone. It is not asked
    where there is nothing to fit.
    """
    quantised = any(bits < 16 for s in plan.sites if s.part == "value" for bits, _ in s.bits)
    fits = quantised and plan.options["metric"] == "fisher" and plan.options.get("refit") is not False
    if moments.text is None or not fits or (whole := model()) is None:
        return
    from kvcompress.runtime.value_fit import fit_values  # and with it transformers
    from kvcompress.runtime.value_fit_elsewhere import fit_values_elsewhere

    report = progress or (lambda *_: None)
    fit: Callable[..., None] = fit_values_elsewhere if isinstance(whole, Elsewhere) else fit_values
    fit(whole, plan, maps, moments.text.long(), lambda done, total: report("values", done, total))


def _fitted_and_chosen(
    checkpoint: Checkpoint,
    moments: Moments,
    options: CompressOptions,
    progress: Progress | None,
    *,
    workers: Workers | None,
    is_lean: bool,
    device: str,
    memory: int | None,
) -> tuple[Mapping[Site, FittedSite], Iterable[tuple[Site, Choice]]]:
    """Return every site's basis, fitted to its moments, and what each keeps; is_lean: both one site at a time."""
    spec = checkpoint.spec
    if options.key_basis == GROUPED:
        groups, choices = choose_groups(spec, moments, options, progress)
        return groups, choices.items()
    fits = Fits(checkpoint, moments, options, device=device)
    fitted = fits if is_lean else fits.held(progress, workers, memory=memory)
    if options.quantised:
        return fitted, choose_bits(spec, moments, options, fitted, device=device)
    return fitted, choose_ranks(spec, options, fitted)


def source_name(source: str) -> str:
    """Return a hub id as it is and a local path made absolute, so that it is found from anywhere."""
    return str(Path(source).absolute()) if Path(source).exists() else source
