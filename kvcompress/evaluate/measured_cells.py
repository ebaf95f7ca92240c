"""The cells of a comparison, measured one at a time on one loaded model, or by workers that have one each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

from kvcompress import __version__
from kvcompress.calibration.calibrate import Progress, obtain_moments
from kvcompress.calibration.measured import calibration_windows
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import Workers
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.compat import cache_argument, decoder_of
from kvcompress.errors import BudgetError, OptionError, UnsupportedModelError
from kvcompress.evaluate.compare_document import LENGTHS, figures_of
from kvcompress.evaluate.deflate import deflated_nbytes
from kvcompress.evaluate.methods import Cell, Request
from kvcompress.evaluate.peer_kqsvd import Grams, collect_grams, kqsvd_plan
from kvcompress.evaluate.peer_run import evaluate_peer
from kvcompress.evaluate.perplexity import Original, evaluate_attached
from kvcompress.evaluate.windows import Windows
from kvcompress.kernels.site import without_kernels
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.planning import make_plan, refit_values
from kvcompress.runtime.attach import attach_plan, attachment_of, detach


class CellBench:
    """One model on one device, on which cells are measured; what they share is made when the first one needs it.

    calibrated_on: the device of the moments, where that is another one than the model's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        request: Request,
        device: str,
        dtype: str,
        report: Progress,
        calibrated_on: str | None = None,
    ) -> None:
        self.calibrated_on = calibrated_on or device
        self.checkpoint, self.output, self.request = checkpoint, output, request
        self.device, self.dtype, self.report = device, dtype, report
        tokenizer = load_tokenizer(checkpoint.path)
        self.windows = Windows.of(tokenizer, request.text, request.seq_len, request.max_windows)
        self.protocol = self.windows.protocol(dtype)
        self._moments: dict[str, Moments] = {}

    @cached_property
    def model(self) -> Any:
        return self._load(self.dtype)

    @cached_property
    def stored_model(self) -> Any:
        """The model in the checkpoint's own dtype, in which bytes are counted."""
        own = self.checkpoint.spec.dtype
        return self.model if own == self.dtype else self._load(own)

    def _load(self, dtype: str) -> Any:
        model = load_weights(self.checkpoint.path, dtype=getattr(torch, dtype))
        return model.to(self.device).eval()

    @cached_property
    def original(self) -> Original:
        return Original(self.model, self.windows, remember=True)

    def key(self, cell: Cell) -> str:
        """Return a name that differs wherever the figures might."""
        setting = {
            "cell": cell.to_json(),
            "protocol": self.protocol,
            "model": self.checkpoint.fingerprint(),
            "device": torch.device(self.device).type,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
        return f"{cell.method}{'' if cell.keep is None else f'-{cell.keep:g}'}-{digest}"

    def measured(
        self, left: list[tuple[int, Cell]], workers: Workers | None, n_cells: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, row) of the cells that are left, as they are measured: here, or by workers."""
        n_windows = self.windows.ids.shape[0]
        done = n_cells - len(left)

        def reached(windows: int, _: int = 0) -> None:
            self.report("compare", done * n_windows + windows, n_cells * n_windows)

        if workers is None:
            rows: Iterable[tuple[int, dict[str, Any]]] = (
                (i, self.measure(c, reached)) for i, (_, c) in enumerate(left)
            )
        else:
            rows = self._measured_by(workers, [cell for _, cell in left])
        reached(0)
        for place, row in rows:
            yield left[place][0], row
            done += 1
            reached(0)

    def _measured_by(self, workers: Workers, cells: list[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
        for cell in cells:  # calibrated once, so that workers find the moments
            if cell.options is not None:
                self._moments_for(cell.options, workers)
        where = str(Path(self.checkpoint.source).absolute()) if self._is_local() else self.checkpoint.source
        shared = (where, str(self.output.absolute()), self.request, self.dtype, self.calibrated_on)
        yield from workers.each(measure_cell, [(*shared, cell) for cell in cells])

    def _is_local(self) -> bool:
        return Path(self.checkpoint.source).exists()

    def measure(self, cell: Cell, progress: Callable[[int, int], None]) -> dict[str, Any]:
        started = time.monotonic()
        row: dict[str, Any] = {"method": cell.method, "kind": cell.kind, "keep_asked": cell.keep}
        try:
            figures = self._peer(cell, progress) if cell.peer else self._planned(cell, progress)
        except (BudgetError, OptionError, UnsupportedModelError) as error:
            return row | {"impossible": str(error)}
        return row | figures | {"seconds": time.monotonic() - started}

    def _peer(self, cell: Cell, progress: Callable[[int, int], None]) -> dict[str, Any]:
        assert cell.peer is not None
        detach(self.model)
        spec = self.checkpoint.spec
        result = evaluate_peer(self.model, self.original, cell.peer, spec, progress=progress)
        cache = result.protocol["cache"]
        return figures_of(result) | {
            "bytes_per_token": cache["bytes_per_token"],
            "cache_bytes": {str(n): cell.peer.cache_bytes(spec, n) for n in LENGTHS},
            "measured_bytes": {"tokens": self.request.seq_len, "bytes": cache["bytes_at_seq_len"]},
        }

    def _planned(self, cell: Cell, progress: Callable[[int, int], None]) -> dict[str, Any]:
        assert cell.options is not None
        plan, maps = self._plan(cell.method, cell.options)
        attach_plan(self.model, plan, maps)
        try:
            result = evaluate_attached(self.model, self.original, progress=progress)
        finally:
            detach(self.model)
        per_token, measured = self._measured_bytes(plan, maps, deflated=cell.method.endswith("-deflate"))
        shrunk = per_token - plan.compressed_bytes_per_token if cell.method.endswith("-deflate") else 0.0
        return figures_of(result) | {
            "keep": per_token / plan.original_bytes_per_token if shrunk else result.keep,
            "bytes_per_token": per_token,
            "cache_bytes": {str(n): plan.cache_bytes(n) + round(shrunk * plan.n_encoded(n)) for n in LENGTHS},
            "measured_bytes": {"tokens": self.request.seq_len, "bytes": measured},
            "maps_bytes": plan.maps_bytes,
            "predicted_loss": plan.predicted_loss,
            "loss_in_nats": plan.loss_in_nats,
            "options": plan.options,
        }

    def _plan(self, method: str, options: CompressOptions) -> tuple[Plan, Mapping[Site, SiteMaps]]:
        """Return what a method makes of the calibration."""
        if method == "kq-svd":
            return kqsvd_plan(self.checkpoint, self.model, self._grams, options)
        moments = self._moments_for(options)
        plan, maps, _ = make_plan(self.checkpoint, moments, options, device=self.device)
        refit_values(lambda: self.model, plan, maps, moments)
        return plan, maps

    @cached_property
    def _grams(self) -> dict[int, Grams]:
        """What KQ-SVD reads of the calibration text, which is that of all methods."""
        detach(self.model)
        tokenizer, options = load_tokenizer(self.checkpoint.path), self.request.options
        windows = calibration_windows(lambda: self.model, tokenizer, options, self.report)
        return collect_grams(self.model, windows.ids, sinks=options.sinks)

    def _moments_for(self, options: CompressOptions, workers: Workers | None = None) -> Moments:
        key = "weights" if options.metric == "weights" else f"{options.group} {options.band}"
        if key not in self._moments:
            self._moments[key] = obtain_moments(
                self.checkpoint,
                self.output / "moments",  # they are saved beside this name
                options,
                device=self.calibrated_on,
                dtype=self.dtype,
                resume=True,
                workers=workers,
                progress=self.report,
            )
        return self._moments[key]

    def _measured_bytes(self, plan: Plan, maps: Mapping[Site, SiteMaps], *, deflated: bool) -> tuple[float, int]:
        """Return (bytes a token beyond the window, bytes in all of one window) from the storages of real caches.

        They are filled in the checkpoint's dtype, with the first window and with half of it, cut at a whole block.
        deflated: what they take at rest, see deflate.py.
        """
        n_tokens = self.windows.ids.shape[1]
        shorter = n_tokens - BLOCK_TOKENS * max(1, n_tokens // 2 // BLOCK_TOKENS)
        sizes = {}
        attach_plan(self.stored_model, plan, maps)
        try:
            for n in (shorter, n_tokens):
                ids, decoder = self.windows.ids[:1, :n].to(self.device), decoder_of(self.stored_model)
                with torch.no_grad(), without_kernels():  # the same bytes, and nothing to compile for each cell
                    cache = attachment_of(self.stored_model).new_cache()
                    decoder(input_ids=ids, use_cache=True, **cache_argument(decoder, cache))
                sizes[n] = deflated_nbytes(cache) if deflated else cache.nbytes()
        finally:
            detach(self.stored_model)
        return (sizes[n_tokens] - sizes[shorter]) / (n_tokens - shorter), sizes[n_tokens]


_AT_HAND = ExitStack()


@lru_cache(maxsize=1)
def _bench_of(source: str, output: str, request: Request, dtype: str, calibrated_on: str, device: str) -> CellBench:
    """Return the bench of a worker's process, which stays for its next cell."""
    _AT_HAND.close()
    checkpoint = _AT_HAND.enter_context(open_checkpoint(source))
    return CellBench(checkpoint, Path(output), request, device, dtype, lambda *_: None, calibrated_on)


def measure_cell(
    source: str, output: str, request: Request, dtype: str, calibrated_on: str, cell: Cell, device: str
) -> dict[str, Any]:
    """Return the row of a cell, in a worker's process."""
    bench = _bench_of(source, output, request, dtype, calibrated_on, device)
    return bench.measure(cell, lambda *_: None)
