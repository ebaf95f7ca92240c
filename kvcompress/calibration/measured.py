"""A calibration now: the text's windows, the model that is run on them, and the sums that are saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.at_hand import Elsewhere, ModelAtHand
from kvcompress.calibration.coherence import measure_coherence
from kvcompress.calibration.fisher import begun, collect_moments
from kvcompress.calibration.memory import limited
from kvcompress.calibration.mixture import Mixture, mixed_windows, window_shares
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.parts import Parts, Seldom
from kvcompress.calibration.pieces import Workers, check_streams, collect_shared, collect_streams, collect_watched
from kvcompress.calibration.sampling import sample_windows
from kvcompress.calibration.streamed import collect_streamed
from kvcompress.calibration.text import check_there
from kvcompress.calibration.worker import Job, streamed_model
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.options import CompressOptions

Progress = Callable[[str, int, int], None]
Collect = Callable[..., Moments]
"""As collect_moments, without its model."""
#: Windows, evenly spread, that are kept with the moments.
_KEPT_WINDOWS = 16
#: How often a streamed calibration reads all layers: to prove rotations, and there and back.
_PASSES = 5


def measured_moments(
    model: ModelAtHand,
    file: Path,
    options: CompressOptions,
    protocol: dict[str, Any],
    *,
    resume: bool,
    workers: Workers | None,
    memory: int | None,
    report: Progress,
) -> Moments:
    """Return the moments of a protocol, measured on its text now and saved in `file`.

    model: of what is calibrated; it is left loaded where this process runs it as a whole.
    memory: bytes in which layers are streamed, None where the whole model is loaded. Other arguments: as those of
    `calibrate.obtain_moments`.
    """
    checkpoint, streams = model.checkpoint, memory is not None
    where, arithmetic = str(checkpoint.path.absolute()), protocol["dtype"]
    if workers and not streams:
        workers.prepare(where, arithmetic)
    load = functools.partial(model, arithmetic, protocol["device"])
    here = not (workers or streams)
    windows = calibration_windows(load, load_tokenizer(checkpoint.path), options, report, loads=here)
    protocol |= {"text_sha256": windows.sha256, "windows": windows.shares}
    shape = (len(windows.ids), windows.ids.shape[1])
    parts = Parts.opened(file.with_suffix(".partial"), protocol, shape, sinks=options.sinks, resume=resume)
    done = lambda tokens, total: report("calibrate", tokens, total)  # noqa: E731
    seen: dict[str, Any] = {"sinks": options.sinks, "recent": options.recent, "seed": options.seed}
    blocks = {"group": protocol["group"], "band": protocol["band"]}
    job = Job(where, arithmetic, windows.ids, **seen, **blocks, parts=parts, memory=memory)
    spread = workers is not None and workers.is_spread
    if (workers or streams) and not spread:
        model.elsewhere = Elsewhere(where, arithmetic, protocol["device"], memory, workers)
    with parts.kept_if_begun():
        if workers:
            model.let_go()  # every worker has a model of its own
            moments, collect = _collected_by(workers, job, checkpoint, done)
        elif streams:
            moments, collect = _collected_in_turn(job, checkpoint, protocol["device"], report)
        else:
            ready = functools.cache(lambda: begun(load(), checkpoint.spec, options.recent))  # for both passes
            collect = lambda *args, **kwargs: collect_moments(ready(), *args, **kwargs)  # noqa: E731
            moments = _collect_here(collect, checkpoint, windows.ids, protocol, parts, seen, done)
        moments.protocol = protocol
        how = seen | {"collect": collect, "device": "cpu" if workers else protocol["device"]}
        adding_up = lambda tokens, total: report("coherence", tokens, total)  # noqa: E731
        with limited(protocol["device"], None if workers else memory):
            measure_coherence(checkpoint.spec, windows.ids, moments, **how, progress=adding_up)
        moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
        moments.text = _spread(windows.ids)
        moments.save(file)
    parts.remove()
    return moments


def _collected_by(
    workers: Workers, job: Job, checkpoint: Checkpoint, progress: Callable[[int, int], None]
) -> tuple[Moments, Collect]:
    """Return the moments of all windows of a job, and the pass for more of them, by workers."""
    if job.memory is not None and not workers.is_remote:
        check_streams(job, checkpoint)
    return collect_shared(job, workers, progress=progress), functools.partial(collect_watched, job, workers)


def _collected_in_turn(job: Job, checkpoint: Checkpoint, device: str, report: Progress) -> tuple[Moments, Collect]:
    """Return the moments of all windows of a job, and the pass for more of them, by this process, layers streamed."""
    check_streams(job, checkpoint)
    layers = streamed_model(job.checkpoint, job.dtype, device)
    moments = collect_streams(job, device, progress=_told_of_layers(report, layers))
    return moments, functools.partial(collect_streamed, layers, scratch=job.parts.directory)


def _spread(ids: Tensor) -> Tensor:
    """Return as many of the windows as are kept with the moments."""
    return ids[torch.linspace(0, len(ids) - 1, min(len(ids), _KEPT_WINDOWS)).round().long()].int()


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
    collect: Collect,
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
    moments = parts.first() or _no_moments(checkpoint, protocol, protocol["device"])
    moments.sites = {site: m.to(protocol["device"]) for site, m in moments.sites.items()}
    collect(checkpoint.spec, windows, moments, **seen, which=missing, save=Seldom(parts.save), progress=progress)
    moments.sites = {site: m.to("cpu") for site, m in moments.sites.items()}
    return parts.joined([moments])


def _no_moments(checkpoint: Checkpoint, protocol: dict[str, Any], device: str) -> Moments:
    return empty_moments(checkpoint.spec, protocol, group=protocol["group"], band=protocol["band"], device=device)


def calibration_windows(
    model: Callable[[], Any], tokenizer: Any, options: CompressOptions, report: Progress, *, loads: bool = False
) -> Mixture:
    """Return the windows that are calibrated on; model: gives the model, where text is sampled from it.

    loads: whether it is to be asked for in any case: then it is loaded while the other texts are read.
    """
    for source in options.calibration:
        check_there(source)
    shares = window_shares(tokenizer, options.calibration, options.tokens, options.seq_len)
    with ThreadPoolExecutor(1) as aside:
        at_hand = aside.submit(model).result if loads else model

        def sampled(n: int) -> Tensor:
            told = lambda done, total: report("sample", done, total)  # noqa: E731
            return sample_windows(at_hand(), tokenizer, n, options.seq_len, seed=options.seed, progress=told)

        return mixed_windows(tokenizer, shares, options.seq_len, sampled=sampled)
