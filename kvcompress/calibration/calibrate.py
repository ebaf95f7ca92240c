"""Where the moments come from: the weights, the file of an earlier run, or a calibration now (measured.py).

What an earlier run left is had without transformers, whose import takes longer than all else of another budget.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from kvcompress.calibration import text as calibration_text
from kvcompress.calibration.at_hand import ModelAtHand
from kvcompress.calibration.builtin import BUNDLED, bundled_text
from kvcompress.calibration.memory import USABLE_SHARE, free_bytes, least_of, whole_bytes
from kvcompress.calibration.mixture import DEFAULT_CALIBRATION
from kvcompress.calibration.moments import MOMENTS_FORMAT, Moments
from kvcompress.calibration.weights_only import weight_moments
from kvcompress.checkpoint.map_budget import moments_group
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.running import is_quantised
from kvcompress.checkpoint.writer import explained_os_errors, remove_stale, way_to
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.options import CompressOptions

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages: sample, calibrate, coherence, fit, write; layers and read (bytes) beside
calibrate where layers are streamed."""


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
    model: ModelAtHand | None = None,
) -> Moments:
    """Return the moments for the options: from the weights, from the file beside `output`, or by calibrating now.

    workers: who sums the windows, in pieces; this process by default. memory: bytes that the calibration may take on
    its device; where the whole model needs more, its layers are read from disk as they run. model: gets the model that
    this process calibrates with, for what comes after.
    """
    report = progress or (lambda *_: None)
    if options.metric == "weights":
        return weight_moments(checkpoint, group=_stored_group(checkpoint, options), band=options.band)
    protocol = _calibration_protocol(checkpoint, options, device, dtype)
    streams = _must_stream(checkpoint, protocol, memory, workers)
    if streams or (workers and workers.is_spread):
        options = _without_sampling(options)
        protocol = _calibration_protocol(checkpoint, options, device, dtype)
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    file = output.parent / f"kvcompress-moments-{key}.safetensors"
    remove_stale(file)
    if file.is_file():
        _lock_of(file).unlink(missing_ok=True)  # of a process that was killed when it had written them
        return _loaded(file, checkpoint)
    from kvcompress.calibration.measured import measured_moments  # here: with all that runs a model

    limit = (memory or _all_bytes(protocol["device"], workers)) if streams else None
    how: dict[str, Any] = {"resume": resume, "workers": workers, "memory": limit, "report": report}
    with _alone(file):
        if file.is_file():  # of the process that this one has waited for
            return _loaded(file, checkpoint)
        return measured_moments(model or ModelAtHand(checkpoint), file, options, protocol, **how)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Within the block, no other process calibrates to `file`; one that does is waited for, and a Note says so.

    The system lets go of the lock of a process that was killed.
    """
    with way_to(file):
        lock = FileLock(_lock_of(file))
        with explained_os_errors(file):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                told = f"another process calibrates to {file}: waiting for its moments."
                warnings.warn(told, Note, stacklevel=4)
                lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            _lock_of(file).unlink(missing_ok=True)  # before another can have it
            lock.release()


def _lock_of(file: Path) -> Path:
    return file.with_suffix(".lock")


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
    least = least_of(checkpoint, *size, protocol["device"])
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


def _loaded(file: Path, checkpoint: Checkpoint) -> Moments:
    """Return saved moments. Raises CalibrationError where they are not of this model."""
    moments, spec = Moments.load(file), checkpoint.spec
    if {s: m.total.numel() for s, m in moments.sites.items()} != {s: spec.width(s) for s in spec.sites}:
        raise CalibrationError(f"{file} holds moments of another model. Remove it to calibrate again.")
    if moments.text is not None and int(moments.text.max()) >= spec.vocab_size:
        raise CalibrationError(f"{file} holds text of another model. Remove it to calibrate again.")
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
