"""compress(): the main flow. Reader -> ModelSpec -> Moments -> Basis -> Allocation -> Plan -> writer -> report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress.bases import BASES, Basis
from kvcompress.calibration import text as calibration_text
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments, weight_moments
from kvcompress.calibration.sampling import sample_windows
from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, save_maps
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.writer import atomic_directory, check_space, check_target, copy_checkpoint
from kvcompress.errors import BudgetError, CheckpointError, UnsupportedModelError
from kvcompress.fitting import FittedSite, fit_site
from kvcompress.folding import write_folded_weights
from kvcompress.map_budget import MAPS_SHARE, default_group, widest_block
from kvcompress.model_spec import DTYPE_BYTES, Site
from kvcompress.options import CompressOptions
from kvcompress.plan import REPORT_FILE, Plan, SitePlan
from kvcompress.policies import POLICIES, Policy, SiteCurve
from kvcompress.report.card import model_card
from kvcompress.report.document import report_document

#: With no text given: what was best on four kinds of text (docs/calibration.md).
DEFAULT_CALIBRATION = (calibration_text.PROSE, calibration_text.CODE)
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages: sample, calibrate, fit, write."""


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
    progress: Progress | None = None,
) -> CompressionResult:
    """Compress the KV cache of a checkpoint and write the result to the directory `output`, atomically.

    source: a checkpoint directory, a GGUF file or a hub id; it is only read. Moments are saved beside the output
    and reused by later calls with the same model and text; `resume` continues a calibration that was killed.
    Raises a KVCompressError with one clear message, leaving nothing behind, for anything a user can mend.
    """
    started = time.monotonic()
    options = options or CompressOptions()
    output = Path(output)
    report = progress or (lambda *_: None)
    check_target(output, force=force)
    with open_checkpoint(source) as checkpoint:
        _check_options(checkpoint, options)
        written = 0 if options.maps_only else checkpoint.weight_bytes
        check_space(output, written + int(MAPS_SHARE * checkpoint.weight_bytes))
        _check_weights_finite(checkpoint)
        moments = obtain_moments(
            checkpoint, output, options, device=device, dtype=dtype, resume=resume, progress=report
        )
        plan, maps, spectra = make_plan(checkpoint, moments, options, report)
        with atomic_directory(output, force=force) as scratch:
            report("write", 0, 1)
            _write(checkpoint, plan, maps, spectra, scratch)
        report("write", 1, 1)
    return CompressionResult(plan, output, time.monotonic() - started)


def make_plan(
    checkpoint: Checkpoint, moments: Moments, options: CompressOptions, progress: Progress | None = None
) -> tuple[Plan, dict[Site, SiteMaps], dict[Site, list[float]]]:
    """Return the plan, the maps of every site that is not kept whole, and each site's energies, from moments alone."""
    spec = checkpoint.spec
    bases = {"key": key_basis(checkpoint, options), "value": value_basis(checkpoint, options)}
    fitted: dict[Site, FittedSite] = {}
    for i, site in enumerate(spec.sites):
        fitted[site] = fit_site(bases[site.part], moments.sites[site], spec.layers[site.layer], site.part, options)
        if progress:
            progress("fit", i + 1, len(spec.sites))
    curves = [SiteCurve(site, f.energy, f.basis.numbers) for site, f in fitted.items()]
    budget = int(options.keep * spec.cache_numbers_per_token + 1e-9)
    kept = make_policy(options).allocate(curves, budget)
    if not any(kept):
        raise BudgetError(f"keep {options.keep} leaves no room for a single component. Raise --keep.")
    sites, maps = [], {}
    for curve, n_items in zip(curves, kept, strict=True):
        site = curve.site
        fit = fitted[site]
        components = fit.basis.components(n_items)
        rank = len(components.block)
        exact = rank == curve.width
        rotated = bases[site.part].commutes_with_rope or spec.layers[site.layer].rotary_dim == 0
        sites.append(
            SitePlan(
                layer=site.layer,
                part=site.part,
                basis=bases[site.part].name,
                rank=rank,
                width=curve.width,
                bits=8 * DTYPE_BYTES[spec.dtype],
                predicted_loss=0.0 if exact else fit.loss(components),
                block_width=fit.blocks.shape[1],
                rotated=site.part == "key" and rotated,
            )
        )
        if not exact:
            map_dtype = torch.float32 if spec.dtype == "float32" else torch.float16
            maps[site] = SiteMaps(
                blocks=fit.blocks.int(),
                encoder=components.encoder.to(map_dtype),
                decoder=components.decoder.to(map_dtype),
                block=components.block.int(),
                bits=torch.full((rank,), sites[-1].bits, dtype=torch.uint8),
                mean=moments.sites[site].mean.float() if fit.centred else None,
            )
    plan = Plan(
        form="folded" if options.folded else "coded",
        source=source_name(checkpoint.source),
        source_fingerprint=checkpoint.fingerprint(),
        architecture=spec.architecture,
        dtype=spec.dtype,
        sites=tuple(sites),
        sinks=options.sinks,
        recent=options.recent,
        options=options.to_json(),
        calibration=moments.protocol,
        loss_in_nats=moments.has_fisher,
        maps_bytes=sum(m.nbytes for m in maps.values()),
        weight_bytes=checkpoint.weight_bytes,
    )
    return plan, maps, {site: f.energy.tolist() for site, f in fitted.items()}


def key_basis(checkpoint: Checkpoint, options: CompressOptions) -> Basis:
    """Return the basis for keys that the options name, blocks chosen to keep the maps light."""
    name = options.key_basis
    if name == "latent":
        return BASES[name](options.group or default_group(checkpoint, options.keep))  # type: ignore[call-arg]
    if name == "band":
        return BASES[name](options.band)  # type: ignore[call-arg]
    if name == "frequency":
        return BASES[name](whole_heads=options.folded)  # type: ignore[call-arg]
    return BASES[name]()


def value_basis(checkpoint: Checkpoint, options: CompressOptions) -> Basis:
    """Return the basis for values that the options name."""
    if options.value_basis == "latent":
        group = options.group or (None if options.folded else default_group(checkpoint, options.keep))
        unit = checkpoint.spec.layers[0].head_dim if options.folded else 1  # a fold caches whole virtual heads
        return BASES["latent"](group, unit=unit)  # type: ignore[call-arg]
    return BASES[options.value_basis]()


def source_name(source: str) -> str:
    """Return a hub id as it is and a local path made absolute, so that it is found from anywhere."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def make_policy(options: CompressOptions) -> Policy:
    return POLICIES["middle"](options.layers) if options.policy == "middle" else POLICIES[options.policy]()  # type: ignore[call-arg]


def obtain_moments(
    checkpoint: Checkpoint,
    output: Path,
    options: CompressOptions,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
) -> Moments:
    """Return the moments for the options: from the weights, from the file beside `output`, or by calibrating now."""
    report = progress or (lambda *_: None)
    first = checkpoint.spec.layers[0]
    chosen = key_basis(checkpoint, options).blocks(first), value_basis(checkpoint, options).blocks(first)
    width = max(widest_block(checkpoint), *(blocks.shape[1] for blocks in chosen))
    if options.metric == "weights":
        return weight_moments(checkpoint, max(a.width for a in checkpoint.spec.layers))
    protocol = _calibration_protocol(checkpoint, options, width, device, dtype)
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    file = output.parent / f"kvcompress-moments-{key}.safetensors"
    partial = file.with_suffix(".partial.safetensors")
    if file.is_file():
        return Moments.load(file)
    if partial.is_file() and not resume:
        partial.unlink()
    model, tokenizer = _load_model(checkpoint, protocol["device"], protocol["dtype"])
    windows = _calibration_windows(model, tokenizer, options, report)
    protocol["text_sha256"] = windows.sha256
    if partial.is_file():
        moments = Moments.load(partial)
        if moments.protocol != protocol:
            moments = empty_moments(checkpoint.spec, width, protocol, protocol["device"])
        moments.sites = {site: m.to(protocol["device"]) for site, m in moments.sites.items()}
    else:
        moments = empty_moments(checkpoint.spec, width, protocol, protocol["device"])
    collect_moments(
        model,
        checkpoint.spec,
        windows.ids,
        moments,
        sinks=options.sinks,
        recent=options.recent,
        seed=options.seed,
        partial_file=partial,
        progress=lambda done, total: report("calibrate", done, total),
    )
    moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
    moments.save(file)
    partial.unlink(missing_ok=True)
    return moments


def _calibration_protocol(
    checkpoint: Checkpoint, options: CompressOptions, width: int, device: str, dtype: str
) -> dict[str, Any]:
    """Return everything that decides the moments; its hash names their file."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        # 16-bit arithmetic is slow on most CPUs, and float32 costs only memory there
        dtype = "float32" if device == "cpu" else checkpoint.spec.dtype
    sources = options.calibration or DEFAULT_CALIBRATION
    return {
        "mode": "fisher",
        "model": checkpoint.fingerprint(),
        "sources": list(sources),
        "source_sha256": [_source_digest(s) for s in sources],
        "tokens": max(1, options.tokens // options.seq_len) * options.seq_len,
        "seq_len": options.seq_len,
        "sinks": options.sinks,
        "recent": options.recent,
        "seed": options.seed,
        "device": device,
        "dtype": dtype,
        "block_width": width,
    }


def _source_digest(source: str) -> str:
    """Return the SHA-256 of a text file, so that changed text is calibrated anew; of the name for other sources."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes() if path.is_file() else source.encode()).hexdigest()


def _calibration_windows(
    model: Any, tokenizer: Any, options: CompressOptions, report: Progress
) -> calibration_text.TextWindows:
    sources = options.calibration or DEFAULT_CALIBRATION
    sampled = None
    if calibration_text.SELF in sources:
        n = calibration_text.share_of(sources, options.tokens, options.seq_len, calibration_text.SELF)
        sampled = sample_windows(
            model, tokenizer, n, options.seq_len, seed=options.seed, progress=lambda d, t: report("sample", d, t)
        )
    return calibration_text.mixed_windows(tokenizer, sources, options.tokens, options.seq_len, sampled=sampled)


def _load_model(checkpoint: Checkpoint, device: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.source} has no usable tokenizer ({str(error).splitlines()[0]}). "
            "Calibration needs one; add its files, or use --no-calibration."
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {checkpoint.source}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


def _check_options(checkpoint: Checkpoint, options: CompressOptions) -> None:
    if options.folded and checkpoint.spec.foldable_obstacle:
        raise UnsupportedModelError(
            f"{checkpoint.source} cannot be folded: {checkpoint.spec.foldable_obstacle}. "
            "Leave out --folded (coded form)."
        )


def _check_weights_finite(checkpoint: Checkpoint) -> None:
    for site in checkpoint.spec.sites:
        checkpoint.site_weight(site)


def _write(
    checkpoint: Checkpoint, plan: Plan, maps: dict[Site, SiteMaps], spectra: dict[Site, list[float]], target: Path
) -> None:
    if plan.form == "folded":
        files = frozenset(entry.file for entry in checkpoint.tensors.values())
        copy_checkpoint(checkpoint.path, target, skip=files)
        write_folded_weights(checkpoint, maps, target)
    elif not plan.options["maps_only"]:
        copy_checkpoint(checkpoint.path, target)
    save_maps(maps, target / MAPS_FILE)
    plan.save(target)
    (target / REPORT_FILE).write_text(json.dumps(report_document(plan, spectra), indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(model_card(plan), encoding="utf-8")
