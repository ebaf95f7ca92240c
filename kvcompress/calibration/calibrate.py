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

from kvcompress.calibration import text as calibration_text
from kvcompress.calibration.builtin import BUNDLED, bundled_text
from kvcompress.calibration.coherence import measure_coherence
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.memory import least_bytes, whole_bytes
from kvcompress.calibration.mixture import DEFAULT_CALIBRATION, Mixture, mixed_windows, window_shares
from kvcompress.calibration.moments import MOMENTS_FORMAT, Moments, empty_moments, weight_moments
from kvcompress.calibration.pieces import Job, Workers, collect_shared
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
"""Called with (stage, done, total); stages: sample, calibrate, coherence, fit, write."""


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
    streams = memory is not None and _must_stream(checkpoint, protocol, memory)
    if streams:
        if workers:
            raise OptionError("a model is streamed (--memory) by one process. Leave out --gpus or --ray.")
        options = _without_sampling(options)
        protocol = _calibration_protocol(checkpoint, options, device, dtype)
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    file = output.parent / f"kvcompress-moments-{key}.safetensors"
    partial = file.with_suffix(".partial.safetensors")
    for left in (file, partial):
        remove_stale(left)
    if file.is_file() or not resume:
        partial.unlink(missing_ok=True)
    if file.is_file():
        return _loaded(file, checkpoint)
    load = functools.cache(lambda: load_weights(checkpoint.path, dtype=protocol["dtype"], device=protocol["device"]))
    windows = calibration_windows(load, load_tokenizer(checkpoint.path), options, report)
    protocol |= {"text_sha256": windows.sha256, "windows": windows.shares}
    device = "cpu" if workers or streams else protocol["device"]  # where sums are kept
    moments = _started(checkpoint, protocol, partial, len(windows.ids), device)
    done = lambda tokens, total: report("calibrate", tokens, total)  # noqa: E731
    seen = {"sinks": options.sinks, "recent": options.recent, "seed": options.seed}
    collect = None
    if streams:
        moments = _no_moments(checkpoint, protocol, device)  # it saves nothing on its way, so it begins anew
        on = torch.device(protocol["device"])
        model = StreamedModel(checkpoint, dtype=getattr(torch, protocol["dtype"]), device=on)
        collect = functools.partial(collect_streamed, model)
        collect(checkpoint.spec, windows.ids, moments, **seen, progress=done)
    elif workers:
        load.cache_clear()  # every worker has a model of its own
        blocks = {"group": protocol["group"], "band": protocol["band"]}
        job = Job(str(checkpoint.path.absolute()), protocol["dtype"], windows.ids, **seen, **blocks)
        collect_shared(job, moments, workers, partial_file=partial, progress=done)
    else:
        collect_moments(load(), checkpoint.spec, windows.ids, moments, **seen, partial_file=partial, progress=done)
    whole = model.model if streams else load()
    adding_up = lambda tokens, total: report("coherence", tokens, total)  # noqa: E731
    measure_coherence(whole, checkpoint.spec, windows.ids, moments, **seen, collect=collect, progress=adding_up)
    moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
    moments.save(file)
    partial.unlink(missing_ok=True)
    return moments


def _must_stream(checkpoint: Checkpoint, protocol: dict[str, Any], memory: int) -> bool:
    """Return whether the whole model does not fit. Raises OptionError where its layers one by one do not, either."""
    size = (protocol["dtype"], protocol["seq_len"])
    least = least_bytes(checkpoint, *size)
    if memory < least:
        raise OptionError(
            f"memory {memory / 1e9:.2f} GB is too little for {checkpoint.source}: two layers, the embeddings and "
            f"one window take about {least / 1e9:.2f} GB. Raise it, or lower --seq-len."
        )
    return memory < whole_bytes(checkpoint, *size)


def _without_sampling(options: CompressOptions) -> CompressOptions:
    """Return the options without text that the model samples from itself: all of it would be read at every token."""
    sources = options.calibration or DEFAULT_CALIBRATION
    if calibration_text.SELF not in sources:
        return options
    told = "the model is streamed from disk, so text that it samples from itself (self) is left out of the calibration."
    warnings.warn(told, Note, stacklevel=2)
    return replace(options, calibration=tuple(s for s in sources if s != calibration_text.SELF))


def _started(checkpoint: Checkpoint, protocol: dict[str, Any], partial: Path, n_windows: int, device: str) -> Moments:
    """Return what a killed run left of the same moments, or moments of no window."""
    if partial.is_file():
        moments = _loaded(partial, checkpoint)
        if moments.protocol == protocol and 0 <= moments.n_windows <= n_windows:
            moments.sites = {site: m.to(device) for site, m in moments.sites.items()}
            return moments
    return _no_moments(checkpoint, protocol, device)


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
