"""compress(): the main flow. Reader -> ModelSpec -> Moments -> Basis -> Allocation -> Plan -> writer -> report."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.calibration.at_hand import ModelAtHand
from kvcompress.calibration.calibrate import Progress, obtain_moments
from kvcompress.calibration.memory import allocatable, limited
from kvcompress.checkpoint.map_budget import MAPS_SHARE
from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, save_maps
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.spilled import SpilledMaps
from kvcompress.checkpoint.writer import atomic_directory, check_space, check_target, copy_checkpoint
from kvcompress.choose.allocation import make_policy
from kvcompress.choose.fits import room_where_needed
from kvcompress.choose.fitting import key_basis, value_basis
from kvcompress.errors import Note, OptionError, OutputError, UnsupportedModelError
from kvcompress.fold.folding import write_folded_weights
from kvcompress.fold.grouping import group_sizes
from kvcompress.model.model_spec import Site
from kvcompress.options import BLOCK_TOKENS, GROUPED, CompressOptions
from kvcompress.plan import REPORT_FILE, Plan
from kvcompress.planning import make_plan, refit_values
from kvcompress.report.card import CARD_FILE, model_card
from kvcompress.report.document import report_document
from kvcompress.side_by_side import fitting_device, side_by_side

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

#: Weights above this are not copied unless it is asked for: a copy would take the disk a second time and minutes, for
#: files that are to the byte the original's. It is 30 billion parameters in 16 bits.
_MOST_COPIED = 60e9


@dataclass(frozen=True)
class CompressionResult:
    """What compress() made: the plan, where it lies, and how long it took."""

    plan: Plan
    output: Path
    seconds: float


def compress(
    source: str | Path,
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    workers: Workers | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    told: dict[str, Any] | None = None,
) -> CompressionResult:
    """Compress the KV cache of a checkpoint, write the result to the directory `output`, and return what was made.

    source: a checkpoint directory, a GGUF file or a hub id; it is only read. output: appears whole or not at all; force
    replaces what is there. device, dtype: of the calibration; "auto" is a GPU if there is one, in the checkpoint's own
    dtype, else the CPU in float32. Moments are saved beside the output and reused by later calls with the same model
    and text; resume continues a calibration that was killed. workers: who sums the calibration's windows
    (calibration.processes, calibration.ray_tasks); this process by default. memory: bytes that calibration and fits may
    take on their device; layers of a larger model are streamed. told: what report.json says besides.
    Raises a KVCompressError with one clear message, leaving nothing behind, for anything a user can mend.
    """
    started = time.monotonic()
    options = options or CompressOptions()
    output = Path(output)
    report = progress or (lambda *_: None)
    check_target(output, force=force)
    with open_checkpoint(source) as checkpoint:
        options = _with_form(checkpoint, options)
        _check_options(checkpoint, output, options)
        written = 0 if options.maps_only else checkpoint.weight_bytes
        check_space(output, written + int(MAPS_SHARE * checkpoint.weight_bytes))
        _check_weights_finite(checkpoint)
        model = ModelAtHand(checkpoint)
        moments = obtain_moments(
            checkpoint,
            output,
            options,
            device=device,
            dtype=dtype,
            resume=resume,
            workers=workers,
            memory=memory,
            progress=report,
            model=model,
        )
        fitters = workers if workers is not None and workers.is_remote else None
        room = None if memory is None else allocatable(memory, solves=True)
        fits_on = fitting_device(device, checkpoint.spec.max_width, room)
        with atomic_directory(output, force=force) as scratch, ThreadPoolExecutor(2) as aside:
            copying = aside.submit(_copy_files, checkpoint, options, scratch)  # gigabytes, while processors are fitting
            card = aside.submit(import_module, "huggingface_hub.repocard")  # half a second, of the model card
            with room_where_needed(checkpoint, moments, options, scratch) as directory:
                with limited(fits_on, memory, solves=True):
                    where: dict[str, Any] = {"workers": fitters, "device": fits_on, "memory": memory}
                    plan, maps, spectra = make_plan(checkpoint, moments, options, report, scratch=directory, **where)
                card.result()  # what is imported next may import parts of it, too
                again = partial(model.again, moments, wanted=options.refit, memory=memory)
                refit_values(again, plan, maps, moments, report)
                report("write", 0, 1)
                copying.result()
                _write(checkpoint, plan, maps, report_document(plan, spectra) | (told or {}), scratch)
        report("write", 1, 1)
    return CompressionResult(plan, output, time.monotonic() - started)


def _with_form(checkpoint: Checkpoint, options: CompressOptions) -> CompressOptions:
    """Return the options with it decided whether weights are written, too."""
    if options.maps_only is not None:
        return options
    large = not options.folded and checkpoint.weight_bytes > _MOST_COPIED
    if large:
        told = f"{checkpoint.weight_bytes / 1e9:.0f} GB of weights are not copied: the output holds maps, to be"
        warnings.warn(f"{told} attached to {checkpoint.source} (--no-maps-only copies them).", Note, stacklevel=3)
    return replace(options, maps_only=large)


def _check_options(checkpoint: Checkpoint, output: Path, options: CompressOptions) -> None:
    source, target = checkpoint.path.resolve(), output.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise OutputError(
            f"{output} overlaps the source {checkpoint.source}, which is never written to. Choose another."
        )
    make_policy(options)
    if options.key_basis == GROUPED:
        group_sizes(checkpoint.spec.layers[0].n_kv_heads, options.per_group)  # raises where heads cannot be split so
    for basis in (key_basis(checkpoint, options), value_basis(checkpoint, options)):
        basis.blocks(checkpoint.spec.layers[0])  # raises for a group or a band that does not divide
    window, exact = checkpoint.spec.window, options.recent + BLOCK_TOKENS
    if window is not None and window - 1 <= exact and not options.folded:
        raise OptionError(
            f"every layer keeps a window of {window} tokens, and with --recent {options.recent} up to {exact - 1} stay "
            "exact: nothing would be compressed. Lower --recent."
        )
    if options.folded and checkpoint.spec.foldable_obstacle:
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot be folded: {checkpoint.spec.foldable_obstacle}. "
            "Leave out --folded (coded form)."
        )


def _check_weights_finite(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for NaN and infinity where it is known what to look at; calibration meets the others."""
    read = [site for site in checkpoint.spec.sites if checkpoint.spec.attention(site).key is not None]

    def check(site: Site) -> None:  # keeps none of them
        checkpoint.site_weight(site)

    side_by_side(check, read, width=checkpoint.spec.max_width)


def _copy_files(checkpoint: Checkpoint, options: CompressOptions, target: Path) -> None:
    """Copy of the source what the output has as it is: everything; of a fold, all but the weights; or nothing."""
    if options.folded or not options.maps_only:
        weights = [] if options.folded else [entry.file for entry in checkpoint.tensors.values()]
        copy_checkpoint(checkpoint.path, target, weights=frozenset(weights))


def _write(
    checkpoint: Checkpoint, plan: Plan, maps: MutableMapping[Site, SiteMaps], document: dict[str, Any], target: Path
) -> None:
    if plan.form == "folded":
        write_folded_weights(checkpoint, maps, target)
    if isinstance(maps, SpilledMaps):
        maps.save(target / MAPS_FILE)
    else:
        save_maps(maps, target / MAPS_FILE)
    plan.save(target)
    (target / REPORT_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if (target / CARD_FILE).exists():  # the source's own card, and its licence terms, stay readable
        (target / CARD_FILE).rename(target / "SOURCE_README.md")
    (target / CARD_FILE).write_text(model_card(plan, checkpoint.path / CARD_FILE), encoding="utf-8")
