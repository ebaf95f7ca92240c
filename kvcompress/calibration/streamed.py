"""Calibration of a model that does not fit: layer by layer for all windows, forward once and then backward.

Each layer's inputs are kept, in files that the system keeps in memory as far as it can; on the way back a layer is
recomputed from them. Every number is that of the pass that holds the whole model (fisher.py): the same labels, the same
kernels, the same order of the sums. What was done is in the files of a directory, a layer at a time, so that a pass
that was killed goes on with the layer that it had begun.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.backward import call_layer, check_finite, decode, layer_gradients
from kvcompress.calibration.fisher import Progress, add_tap, check_moments, head_gradient, label_seed, n_samples_of
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.stores import Flow, Store
from kvcompress.calibration.taps import Taps, tapped
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.checkpoint.writer import atomic_file
from kvcompress.errors import UnsupportedModelError
from kvcompress.model.head import after_layers, standing_in
from kvcompress.model.model_spec import PARTS, ModelSpec, Site
from kvcompress.model.probe import matched, probe, signature

Call = tuple[tuple[Any, ...], dict[str, Any]]
_STATE_FILE = "state.json"


def collect_streamed(
    streamed: StreamedModel,
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    which: Sequence[int] | None = None,
    directory: Path | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Add windows (all, or `which`) to `moments` (of no window yet, on the CPU) and return it, as collect_moments does.

    On the device are two layers of the model, one window's activations and the sums of one layer. directory: where the
    pass keeps what it has done, and finds what an earlier one had done of the same windows; the caller removes it.
    scratch: where it keeps it for itself, by default where temporary files are. Progress counts the way there and back,
    in tokens. Raises UnsupportedModelError where layers are handed more than hidden states and what is the same for
    every text, CalibrationError as collect_moments does.
    """
    if any(len(a.readers) > 1 for a in spec.layers):
        raise UnsupportedModelError("layers of this model share keys and values, so it cannot be streamed.")
    spec = proven(streamed, spec)
    moments.rotations, moments.signature = spec.rotations, streamed.signature
    which = list(range(len(windows)) if which is None else which)
    with tapped(streamed.model, spec, recent) as taps, _kept(directory, scratch) as kept:
        one_pass = _Pass(streamed, spec, taps, windows, which, kept, _steps(progress, windows.numel(), streamed, which))
        one_pass.forward()
        one_pass.tail(seed)
        one_pass.backward(moments, sinks)
    moments.order = which
    check_moments(moments)
    return moments


def proven(streamed: StreamedModel, spec: ModelSpec) -> ModelSpec:
    """Return the spec with the rotations as the model turns its keys; it reads all weights a few times, but once."""
    if streamed.spec is None:
        with streamed.all_in_turn():
            streamed.spec = matched(probe(streamed.model, at_once=True), spec)
            streamed.signature = signature(streamed.model, streamed.spec)
    found: ModelSpec = streamed.spec
    return found


class _Pass:
    """One pass over some windows, there and back; what is done is kept after every layer."""

    def __init__(
        self,
        streamed: StreamedModel,
        spec: ModelSpec,
        taps: Taps,
        windows: Tensor,
        which: list[int],
        kept: Path,
        steps: Callable[[int], None],
    ) -> None:
        self.streamed, self.spec, self.taps, self.kept, self.steps = streamed, spec, taps, kept, steps
        self.windows, self.which, self.n_layers = windows, which, len(streamed.layers)
        self.calls, first = _first_inputs(streamed, taps, windows, which)
        self._shape, self._dtype = (len(which), *first.shape[1:]), first.dtype
        self.done = _state(kept)
        self._stores = {name: self._store(name, exists=True) for name in self.done.get("stores", ())}
        self.steps(self.done.get("steps", 0) * len(which))

    def forward(self) -> None:
        """Leave every layer's inputs in a store, and what the last one returns."""
        done = self.done.get("forward", -1)
        if done < 0:
            self._embed()
            self._keep(forward=0, stores=["inputs-0"])
            done = 0
        for index, layer in self.streamed.in_order(range(done, self.n_layers)):
            into = self._store(f"inputs-{index + 1}")
            with Flow(self.streamed.device, [self._stores[f"inputs-{index}"]], into) as flow:
                for place, (x,) in flow.rows():
                    with torch.no_grad():
                        flow.put(place, call_layer(layer, self.taps, x, self.calls[index]))
                    self.steps(1)
            self._stores[f"inputs-{index + 1}"] = into
            self._keep(forward=index + 1, steps=index + 1)

    def tail(self, seed: int) -> None:
        """Leave the gradient of the loss by what the last layer returned."""
        if "backward" in self.done:
            return
        into, last = self._store(f"gradient-{self.n_layers}"), f"inputs-{self.n_layers}"
        with Flow(self.streamed.device, [self._stores[last]], into) as flow:
            for place, (x,) in flow.rows():
                window = self.which[place]
                ids = self.windows[window : window + 1].to(self.streamed.device)
                flow.put(place, _tail(self.streamed, x, ids, label_seed(seed, window)))
        self._stores[f"gradient-{self.n_layers}"] = into
        self._keep(backward=self.n_layers)
        self._drop(last)

    def backward(self, moments: Moments, sinks: int) -> None:
        """Add every layer's sums to `moments`, the last layer's first."""
        left = range(self.done["backward"])
        for index in range(len(left), self.n_layers):
            self._restore(moments, index)
        for index, layer in self.streamed.in_order(left[::-1]):
            inputs, gradients = self._stores[f"inputs-{index}"], self._stores[f"gradient-{index + 1}"]
            into = self._store(f"gradient-{index}")
            with Flow(self.streamed.device, [inputs, gradients], into) as flow:
                for place, (x, gradient) in flow.rows():
                    gradient, found = layer_gradients(layer, self.taps, x, self.calls[index], gradient)
                    flow.put(place, gradient)
                    n_samples = n_samples_of(self.which[place], len(self.windows))
                    for site, tap, *grads in found:
                        add_tap(self.spec, moments, site, tap, grads, sinks=sinks, n_samples=n_samples)
                    self.steps(1)
            self.taps.layers.clear()
            self._stores[f"gradient-{index}"] = into
            self._save(moments, index)
            self._keep(backward=index, steps=2 * self.n_layers - index)
            self._drop(f"inputs-{index}")
            self._drop(f"gradient-{index + 1}")

    def _embed(self) -> None:
        store = self._stores["inputs-0"] = self._store("inputs-0")
        for place, window in enumerate(self.which):
            ids = self.windows[window : window + 1].to(self.streamed.device)
            store.put(place, how_called(self.streamed, self.taps, ids)[0][1])

    def _save(self, moments: Moments, index: int) -> None:
        """Take a layer's sums off the device and keep them."""
        sites = {site: moments.sites[site].to("cpu") for part in PARTS if (site := Site(index, part)) in moments.sites}
        moments.sites |= sites
        if sites and all(sums.outer for sums in sites.values()):  # watches (coherence.py) are not kept
            Moments(sites, order=self.which).save(self.kept / f"sums-{index}.safetensors")

    def _restore(self, moments: Moments, index: int) -> None:
        file = self.kept / f"sums-{index}.safetensors"
        if file.is_file():
            moments.sites |= Moments.load(file).sites

    def _store(self, name: str, *, exists: bool = False) -> Store:
        return Store(self.kept / name, self._shape, self._dtype, exists=exists)

    def _drop(self, name: str) -> None:
        self._stores.pop(name).remove()
        self._keep()

    def _keep(self, **done: Any) -> None:
        """Write down what is done."""
        self.done |= done | {"stores": sorted(self._stores), "windows": self.which, "n_steps": 2 * self.n_layers}
        with atomic_file(self.kept / _STATE_FILE) as scratch:
            scratch.write_text(json.dumps(self.done), encoding="utf-8")


def _state(kept: Path) -> dict[str, Any]:
    """Return what an earlier pass had done; it wrote the file itself, in a directory of this calibration alone."""
    file = kept / _STATE_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def begun_windows(directory: Path) -> list[int]:
    """Return the windows of a pass that was begun in a directory, [] where none was."""
    found: list[int] = _state(directory).get("windows", [])
    return found


def share_done(directory: Path) -> float:
    """Return how much of a pass in a directory is done, there and back."""
    state = _state(directory)
    return float(state.get("steps", 0) / state.get("n_steps", 1))


@contextmanager
def _kept(directory: Path | None, scratch: Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="kvcompress-stream-", dir=scratch) as own:
            yield Path(own)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory


def _tail(streamed: StreamedModel, hidden: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Return d(loss)/d(what the last layer returned), labels sampled from the model."""
    check_finite(hidden)
    hidden = hidden.requires_grad_(True)
    with torch.enable_grad():
        final = after_layers(streamed.model, list(streamed.layers), hidden, ids, in_tuple=streamed.in_tuple)
    return torch.autograd.grad(final, hidden, head_gradient(streamed.model, final.detach(), seed=seed))[0]


def how_called(streamed: StreamedModel, taps: Taps, ids: Tensor) -> list[tuple[Call, Tensor]]:
    """Return how each layer is called, and the hidden states in it; no layer runs."""
    layers, found = list(streamed.layers), list[tuple[Call, Tensor]]()

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append(((args, kwargs), hidden))
        return (hidden,) if streamed.in_tuple else hidden

    with standing_in(layers, [note] * len(layers)), torch.no_grad():
        decode(streamed.model, taps, ids)
    return found


def _first_inputs(
    streamed: StreamedModel, taps: Taps, windows: Tensor, which: Sequence[int]
) -> tuple[list[Call], Tensor]:
    """Return how each layer is called for any window, and what the first one is handed of one.

    Raises UnsupportedModelError where the other arguments are not the same for two windows.
    """
    ids = [windows[w : w + 1].to(streamed.device) for w in (which[0], which[-1])]
    if torch.equal(*ids):  # a text that no window is, so that there are two
        ids[1] = ids[0].roll(1, dims=1)
    calls, others = (how_called(streamed, taps, i) for i in ids)
    if not all(_alike(a, b) for (a, _), (b, _) in zip(calls, others, strict=True)):
        raise UnsupportedModelError("layers of this model are handed more of a text than hidden states.")
    return [call for call, _ in calls], calls[0][1]


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


def _steps(
    progress: Progress | None, n_tokens: int, streamed: StreamedModel, which: Sequence[int]
) -> Callable[[int], None]:
    """Return what is called with windows that a layer is done with."""
    n_steps, done = 2 * len(streamed.layers) * len(which), 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        if progress and more:
            progress(n_tokens * done // n_steps, n_tokens)

    return step
