"""Where the moments come from: the weights, the file of an earlier run, or a calibration now."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration import text as calibration_text
from kvcompress.calibration.builtin import BUNDLED, bundled_text
from kvcompress.calibration.coherence import measure_coherence
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.memory import CONTEXT_BYTES, USABLE_SHARE, free_bytes, least_bytes, limited, whole_bytes
from kvcompress.calibration.mixture import DEFAULT_CALIBRATION, Mixture, mixed_windows, window_shares
from kvcompress.calibration.moments import MOMENTS_FORMAT, Moments, empty_moments, weight_moments
from kvcompress.calibration.parts import Parts, Seldom
from kvcompress.calibration.pieces import (
    Job,
    Workers,
    check_streams,
    collect_shared,
    collect_streams,
    collect_watched,
    streamed_model,
)
from kvcompress.calibration.sampling import sample_windows
from kvcompress.calibration.streamed import collect_streamed
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.map_budget import moments_group
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.checkpoint.running import is_quantised
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.checkpoint.writer import remove_stale
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.options import CompressOptions

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages: sample, calibrate, coherence, fit, write; layers and read (bytes) beside
calibrate where layers are streamed."""
#: How often a streamed calibration reads all layers: to prove rotations, and there and back.
_PASSES = 5


def obtain_moments(
    checkpoint: Checkpoint,
    output: Path,
    options: CompressOptions,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    workers: Workers | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Return the moments for the options: from the weights, from the file beside `output`, or by calibrating now.

    workers: who sums the windows, in pieces; this process by default. memory: bytes that the calibration may take on
    its device; where the whole model needs more, its layers are read from disk as they run.
    """
    report = progress or (lambda *_: None)
    if options.metric == "weights":
        return weight_moments(checkpoint, group=_stored_group(checkpoint, options), band=options.band)
    protocol = _calibration_protocol(checkpoint, options, device, dtype)
    streams = _must_stream(checkpoint, protocol, memory, workers)
    if streams or getattr(workers, "is_spread", False):
        options = _without_sampling(options)
        protocol = _calibration_protocol(checkpoint, options, device, dtype)
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    file = output.parent / f"kvcompress-moments-{key}.safetensors"
    remove_stale(file)
    if file.is_file():
        return _loaded(file, checkpoint)
    where, arithmetic = str(checkpoint.path.absolute()), protocol["dtype"]
    if workers and not streams:
        workers.prepare(where, arithmetic)
    load = functools.cache(lambda: load_weights(checkpoint.path, dtype=arithmetic, device=protocol["device"]))
    windows = calibration_windows(load, load_tokenizer(checkpoint.path), options, report)
    protocol |= {"text_sha256": windows.sha256, "windows": windows.shares}
    shape = (len(windows.ids), windows.ids.shape[1])
    parts = Parts.opened(file.with_suffix(".partial"), protocol, shape, sinks=options.sinks, resume=resume)
    done = lambda tokens, total: report("calibrate", tokens, total)  # noqa: E731
    seen: dict[str, Any] = {"sinks": options.sinks, "recent": options.recent, "seed": options.seed}
    blocks = {"group": protocol["group"], "band": protocol["band"]}
    limit = (memory or _all_bytes(protocol["device"], workers)) if streams else None
    job = Job(where, arithmetic, windows.ids, **seen, **blocks, parts=parts, memory=limit)
    device = "cpu" if workers or streams else protocol["device"]  # where tokens come
    collect: Callable[..., Moments]
    with parts.kept_if_begun():
        if workers:
            load.cache_clear()  # every worker has a model of its own
            moments = collect_shared(job, workers, progress=done)
            collect = functools.partial(collect_watched, job, workers)
        elif streams:
            check_streams(job, checkpoint)
            model = streamed_model(where, arithmetic, protocol["device"])
            moments = collect_streams(job, protocol["device"], progress=_told_of_layers(report, model))
            collect = functools.partial(collect_streamed, model, scratch=parts.directory)
            device = protocol["device"]
        else:
            collect = functools.partial(collect_moments, load())
            moments = _collect_here(collect, checkpoint, windows.ids, protocol, parts, seen, done)
        moments.protocol = protocol
        adding_up = lambda tokens, total: report("coherence", tokens, total)  # noqa: E731
        with limited(protocol["device"], None if workers else limit):
            measure_coherence(
                checkpoint.spec, windows.ids, moments, **seen, collect=collect, device=device, progress=adding_up
            )
        moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
        moments.save(file)
    parts.remove()
    return moments


def _told_of_layers(report: Progress, model: StreamedModel) -> Callable[[int, int], None]:
    """Return a progress callback in tokens that also tells of layers, there and back, and of bytes read."""
    n_layers, before = 2 * len(model.layers), model.reading.n_bytes

    def told(tokens: int, total: int) -> None:
        report("calibrate", tokens, total)
        report("layers", tokens * n_layers // total, n_layers)
        read = model.reading.n_bytes - before
        report("read", read, max(read, _PASSES * model.layer_bytes))

    return told


def _collect_here(
    collect: Callable[..., Moments],
    checkpoint: Checkpoint,
    windows: Tensor,
    protocol: dict[str, Any],
    parts: Parts,
    seen: dict[str, int],
    progress: Callable[[int, int], None],
) -> Moments:
    """Return the moments of all windows, those of the parts included; this process sums the others."""
    missing = parts.missing()
    if not missing:
        return parts.joined([])
    moments = parts.first() or _no_moments(checkpoint, protocol, "cpu")
    moments.sites = {site: m.to(protocol["device"]) for site, m in moments.sites.items()}
    collect(checkpoint.spec, windows, moments, **seen, which=missing, save=Seldom(parts.save), progress=progress)
    moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
    return parts.joined([moments])


def _must_stream(checkpoint: Checkpoint, protocol: dict[str, Any], memory: int | None, workers: Workers | None) -> bool:
    """Return whether the whole model does not fit. Raises OptionError where its layers one by one do not, either.

    memory: None for what is there: of this process what is free, of workers what their devices have.
    """
    size = (protocol["dtype"], protocol["seq_len"])
    whole = whole_bytes(checkpoint, *size)
    if memory is None:
        if workers.hold(whole) if workers else (free_bytes(protocol["device"]) or whole) >= whole:
            return False
        memory = _all_bytes(protocol["device"], workers)
    least = least_bytes(checkpoint, *size) + (CONTEXT_BYTES if protocol["device"].startswith("cuda") else 0)
    if memory < least:
        raise OptionError(
            f"memory {memory / 1e9:.2f} GB is too little for {checkpoint.source}: two layers, the embeddings and "
            f"one window take about {least / 1e9:.2f} GB. Raise it, or lower --seq-len."
        )
    return memory < whole


def _all_bytes(device: str, workers: Workers | None) -> int:
    """Return the bytes that streaming may take where no number was given."""
    if workers is None or not device.startswith("cuda"):
        return free_bytes(device) or 0
    return int(torch.cuda.get_device_properties(device).total_memory * USABLE_SHARE)


def _without_sampling(options: CompressOptions) -> CompressOptions:
    """Return the options without text that the model samples from itself: all of it would be read at every token."""
    sources = options.calibration or DEFAULT_CALIBRATION
    if calibration_text.SELF not in sources:
        return options
    told = "no device holds the model, so text that it samples from itself (self) is left out of the calibration."
    warnings.warn(told, Note, stacklevel=2)
    return replace(options, calibration=tuple(s for s in sources if s != calibration_text.SELF))


def _no_moments(checkpoint: Checkpoint, protocol: dict[str, Any], device: str) -> Moments:
    return empty_moments(checkpoint.spec, protocol, group=protocol["group"], band=protocol["band"], device=device)


def _loaded(file: Path, checkpoint: Checkpoint) -> Moments:
    """Return saved moments. Raises CalibrationError where they are not of this model."""
    moments, spec = Moments.load(file), checkpoint.spec
    if {s: m.total.numel() for s, m in moments.sites.items()} != {s: spec.width(s) for s in spec.sites}:
        raise CalibrationError(f"{file} holds moments of another model. Remove it to calibrate again.")
    return moments


def _stored_group(checkpoint: Checkpoint, options: CompressOptions) -> int:
    """Return the KV heads in a block of the moments: the default, unless the options need other blocks."""
    if options.folded:  # a fold's values are mixed over all heads
        return checkpoint.spec.layers[0].n_kv_heads
    group = moments_group(checkpoint)
    return options.group if options.group and group % options.group else group


def _calibration_protocol(checkpoint: Checkpoint, options: CompressOptions, device: str, dtype: str) -> dict[str, Any]:
    """Return everything that decides the moments; its hash names their file."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        # 16-bit arithmetic is slow on most CPUs, and float32 costs only memory there
        dtype = "float32" if device == "cpu" and not is_quantised(checkpoint.config) else checkpoint.spec.dtype
    sources = options.calibration or DEFAULT_CALIBRATION
    group = _stored_group(checkpoint, options)
    whole = group == checkpoint.spec.layers[0].n_kv_heads  # then bands are parts of what is kept anyway
    return {
        "mode": "fisher",
        "format": MOMENTS_FORMAT,
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
        "group": group,
        "band": CompressOptions().band if whole else options.band,
    }


def _source_digest(source: str) -> str:
    """Return the SHA-256 of a text's files, so that changed text is calibrated anew; of the name for other sources."""
    if source in BUNDLED:  # another version of the package may hold another text
        return hashlib.sha256(bundled_text(source).encode()).hexdigest()
    path = Path(source)
    files = calibration_text.text_files(path) if path.is_dir() else [path] if path.is_file() else []
    digest = hashlib.sha256(b"" if files else source.encode())
    for file in files:
        with file.open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def calibration_windows(
    model: Callable[[], Any], tokenizer: Any, options: CompressOptions, report: Progress
) -> Mixture:
    """Return the windows that are calibrated on; model: gives the model, where text is sampled from it."""
    shares = window_shares(tokenizer, options.calibration, options.tokens, options.seq_len)
    sampled = None
    if n := shares.get(calibration_text.SELF):
        sampled = sample_windows(
            model(), tokenizer, n, options.seq_len, seed=options.seed, progress=lambda d, t: report("sample", d, t)
        )
    return mixed_windows(tokenizer, shares, options.seq_len, sampled=sampled)
