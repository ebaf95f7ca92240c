"""Calibration of a model that does not fit: layer by layer for all windows, forward once and then backward.

Each layer's inputs are kept, in files that the system keeps in memory as far as it can; on the way back a layer is
recomputed from them. Every number is that of the pass that holds the whole model (fisher.py): the same labels, the same
kernels, the same order of the sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.backward import call_layer, check_finite, decode, layer_gradients
from kvcompress.calibration.fisher import Progress, add_tap, check_moments, head_gradient, n_samples_of
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.taps import Taps, tapped
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.errors import UnsupportedModelError
from kvcompress.model.head import after_layers, standing_in
from kvcompress.model.model_spec import PARTS, ModelSpec, Site
from kvcompress.model.probe import matched, probe, signature

Call = tuple[tuple[Any, ...], dict[str, Any]]


def collect_streamed(
    streamed: StreamedModel,
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    progress: Progress | None = None,
) -> Moments:
    """Add every window to `moments` (of no window yet, on the CPU) and return it, as collect_moments does.

    On the device are two layers of the model, one window's activations and the sums of one layer. Progress counts the
    way there and back, in tokens. Raises UnsupportedModelError where layers are handed more than hidden states and what
    is the same for every text, CalibrationError as collect_moments does.
    """
    model, layers, device = streamed.model, streamed.layers, streamed.device
    with streamed.all_in_turn():
        spec = matched(probe(model), spec)
        moments.rotations, moments.signature = spec.rotations, signature(model, spec)
    if any(len(a.readers) > 1 for a in spec.layers):
        raise UnsupportedModelError("layers of this model share keys and values, so it cannot be streamed.")
    steps = _steps(progress, windows.numel(), 2 * len(layers) * len(windows))
    n_windows = len(windows)
    with tapped(model, spec, recent) as taps, tempfile.TemporaryDirectory(prefix="kvcompress-stream-") as scratch:
        calls, hidden = _first_inputs(streamed, taps, windows, Path(scratch))
        inputs: list[_Store] = []
        for index, layer in streamed.in_order(range(len(layers))):
            inputs.append(hidden.like(Path(scratch) / f"inputs-{index}"))
            for w in range(n_windows):
                x = hidden.get(w, device)
                inputs[index].put(w, x)
                with torch.no_grad():
                    hidden.put(w, call_layer(layer, taps, x, calls[index]))
                steps()
        for w in range(n_windows):
            ids = windows[w : w + 1].to(device)
            hidden.put(w, _tail(streamed, hidden.get(w, device), ids, seed * 1_000_003 + w))
        for index, layer in streamed.in_order(range(len(layers))[::-1]):
            _move(moments, index, device)
            for w in range(n_windows):
                x, gradient = inputs[index].get(w, device), hidden.get(w, device)
                gradient, found = layer_gradients(layer, taps, x, calls[index], gradient)
                hidden.put(w, gradient)
                for site, tap, *grads in found:
                    n_samples = n_samples_of(w, n_windows)
                    add_tap(spec, moments, site, tap, grads, sinks=sinks, n_samples=n_samples)
                steps()
            taps.layers.clear()
            inputs[index].remove()
            _move(moments, index, torch.device("cpu"))
    moments.n_windows = n_windows
    check_moments(moments)
    return moments


def _tail(streamed: StreamedModel, hidden: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Return d(loss)/d(what the last layer returned), labels sampled from the model."""
    check_finite(hidden)
    generator = torch.Generator(streamed.device).manual_seed(seed)
    hidden = hidden.requires_grad_(True)
    with torch.enable_grad():
        final = after_layers(streamed.model, list(streamed.layers), hidden, ids, in_tuple=streamed.in_tuple)
    return torch.autograd.grad(final, hidden, head_gradient(streamed.model, final.detach(), generator))[0]


def _first_inputs(streamed: StreamedModel, taps: Taps, windows: Tensor, scratch: Path) -> tuple[list[Call], _Store]:
    """Return how each layer is called, and what the first one is handed of each window; no layer runs.

    Raises UnsupportedModelError where the other arguments are not the same for two windows.
    """
    layers, found = list(streamed.layers), list[Call]()

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if streamed.in_tuple else hidden

    calls: list[Call] = []
    store: _Store | None = None
    for w in range(len(windows)):
        found.clear()
        with standing_in(layers, [note] * len(layers)), torch.no_grad():
            decode(streamed.model, taps, windows[w : w + 1].to(streamed.device))
        if w == 0:
            calls = list(found)
        elif w == 1 and not all(_alike(a, b) for a, b in zip(calls, found, strict=True)):
            raise UnsupportedModelError("layers of this model are handed more of a text than hidden states.")
        args, kwargs = found[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        store = store or _Store(scratch / "hidden", (len(windows), *hidden.shape[1:]), hidden.dtype)
        store.put(w, hidden)
    assert store is not None
    return calls, store


def _alike(a: Any, b: Any, *, outermost: bool = True) -> bool:
    """Return whether two calls of a layer differ in nothing but hidden states and caches."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if outermost:
        (args, kwargs), (others, named) = a, b
        pairs = [*zip(args[1:], others[1:], strict=True)]
        pairs += [(value, named[key]) for key, value in kwargs.items() if key != "hidden_states"]
        return all(_alike(x, y, outermost=False) for x, y in pairs)
    if isinstance(a, (tuple, list)):
        return all(_alike(x, y, outermost=False) for x, y in zip(a, b, strict=True))
    return True


class _Store:
    """A tensor [n_windows, seq_len, d_model] in a file, which the system keeps in memory where there is room."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, n = file, 1
        for size in shape:
            n *= size
        self._all: Tensor | None = torch.from_file(str(file), shared=True, size=n, dtype=dtype).view(shape)

    def like(self, file: Path) -> _Store:
        """Return another one of the same shape."""
        return _Store(file, tuple(self._rows.shape), self._rows.dtype)

    def get(self, window: int, device: torch.device) -> Tensor:
        """Return a window's [1, seq_len, d_model], a copy on the device."""
        return self._rows[window : window + 1].to(device, copy=True)

    def put(self, window: int, hidden: Tensor) -> None:
        self._rows[window] = hidden[0].detach().cpu()

    def remove(self) -> None:
        self._all = None
        self._file.unlink()

    @property
    def _rows(self) -> Tensor:
        assert self._all is not None
        return self._all


def _move(moments: Moments, layer: int, device: torch.device) -> None:
    for part in PARTS:
        if (site := Site(layer, part)) in moments.sites:
            moments.sites[site] = moments.sites[site].to(str(device))


def _steps(progress: Progress | None, n_tokens: int, n_steps: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(n_tokens * done // n_steps, n_tokens)

    return step
