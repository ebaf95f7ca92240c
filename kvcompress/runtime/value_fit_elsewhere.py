"""Decoders of values fitted where the model is: by a worker that holds it, or layer by layer as they come from disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.calibration.at_hand import Elsewhere
from kvcompress.calibration.backward import call_layer
from kvcompress.calibration.memory import limited
from kvcompress.calibration.pieces import Workers
from kvcompress.calibration.streamed import how_called, proven
from kvcompress.calibration.taps import Taps
from kvcompress.calibration.worker import loaded_model, streamed_model
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.checkpoint.spilled import SpilledMaps
from kvcompress.errors import Note, OptionError, UnsupportedModelError
from kvcompress.model.model_spec import Site
from kvcompress.model.recording import extras_of
from kvcompress.plan import Plan
from kvcompress.runtime.layers import kernels_of, planned_rotations, rotaries_of
from kvcompress.runtime.simulation import SimulatedLayer, Simulation, simulated_attention
from kvcompress.runtime.tokens import TokenLine
from kvcompress.runtime.value_fit import ReadValues, fit_values, is_fitted, watched

_NAME = "kvcompress_values"
Progress = Callable[[int, int], None]


def fit_values_elsewhere(
    place: Elsewhere,
    plan: Plan,
    maps: MutableMapping[Site, SiteMaps],
    windows: Tensor,
    progress: Progress | None = None,
) -> None:
    """Do what `value_fit.fit_values` does, to the same numbers, where the model of `place` is.

    A Note says where that cannot be done: layers that cannot be streamed, maps that cannot be sent.
    """
    try:
        if place.workers is None:
            _fitting(place, place.device)(plan, maps, windows, progress)
        else:
            _fit_by(place.workers, place, plan, maps, windows)
    except (OptionError, UnsupportedModelError) as error:
        told = f"decoders of values are not fitted to what queries read of them: {error}"
        warnings.warn(told, Note, stacklevel=2)
        return
    if progress:
        progress(windows.numel(), windows.numel())


def _fit_by(
    workers: Workers, place: Elsewhere, plan: Plan, maps: MutableMapping[Site, SiteMaps], windows: Tensor
) -> None:
    """Let a worker fit. Raises OptionError for maps on a disk that workers do not have."""
    lie_on_disk = isinstance(maps, SpilledMaps)
    if lie_on_disk and workers.is_remote:
        raise OptionError("maps are too large to be sent.")
    given = maps if lie_on_disk else {site: _arrays(own) for site, own in maps.items()}
    for _, found in workers.each(_fitted, [(replace(place, workers=None), plan, given, windows.numpy())]):
        for site, own in found.items():
            maps[site] = _of_arrays(own)


def _fitted(place: Elsewhere, plan: Plan, given: Any, windows: Any, device: str) -> dict[Site, Any]:
    """Return the maps of values that a worker has fitted, as arrays; given: all maps, as arrays or on a disk of its."""
    maps = dict(given) if isinstance(given, SpilledMaps) else {site: _of_arrays(own) for site, own in given.items()}
    before = dict(maps)
    _fitting(place, device)(plan, maps, torch.tensor(windows))
    return {site: _arrays(own) for site, own in maps.items() if own is not before[site]}


def _fitting(place: Elsewhere, device: str) -> Callable[..., None]:
    """Return what fits as `value_fit.fit_values`, all arguments but the model given, to the model of `place`."""

    def fit(*what: Any) -> None:
        if place.memory is None:
            return fit_values(loaded_model(place.checkpoint, place.dtype, device), *what)
        with limited(device, place.memory, solves=True):
            fit_values_streamed(streamed_model(place.checkpoint, place.dtype, device), *what)

    return fit


@torch.no_grad()
def fit_values_streamed(
    streamed: StreamedModel,
    plan: Plan,
    maps: MutableMapping[Site, SiteMaps],
    windows: Tensor,
    progress: Progress | None = None,
) -> None:
    """As `value_fit.fit_values`: all windows go through a layer before the next one is read.

    On the device are two layers, one window and the codecs of one layer; hidden states wait in memory.
    """
    spec, device = proven(streamed, streamed.checkpoint.spec), streamed.device
    if not all(a.readers for a in spec.layers):
        return
    simulated = _Simulated(plan, windows.shape[1])
    taps, rotaries = Taps(streamed.model, spec, plan.recent), rotaries_of(planned_rotations(plan), device)
    by_layer, n_layers = {a.layer: a for a in spec.layers}, len(streamed.layers)
    with compat.attention_replaced(streamed.model, _NAME, simulated.attend):
        calls = [call for call, _ in how_called(streamed, taps, windows[:1].to(device))]
        hidden = [_kept(how_called(streamed, taps, row[None].to(device))[0][1]) for row in windows]
        for index, layer in streamed.in_order(range(n_layers)):
            codecs = kernels_of(by_layer[index], plan, maps, rotaries, device) if index in by_layer else None
            site, read = Site(index, "value"), None
            if codecs is not None and site in maps and is_fitted(codecs, maps[site]):
                read = ReadValues(codecs, maps[site])
            simulated.take(codecs, read)
            for x in hidden:
                x.copy_(call_layer(layer, taps, x.to(device), calls[index]))
            if read is not None:
                maps[site] = read.fitted(maps[site])
            if progress:
                progress((index + 1) * windows.numel() // n_layers, windows.numel())


def _kept(hidden: Tensor) -> Tensor:
    """Return hidden states in memory of this host, such as a GPU's copies reach directly."""
    return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda).copy_(hidden)


class _Simulated:
    """Attention of the layer at hand, which sees old tokens as its codecs give them back."""

    def __init__(self, plan: Plan, n_tokens: int) -> None:
        self._plan = plan
        self._layer: SimulatedLayer | None = None
        self._tokens = TokenLine(plan.sinks, plan.recent, counts_bytes=False)
        self._tokens.append(torch.arange(n_tokens)[None], 1)

    def take(self, codecs: Any, read: ReadValues | None) -> None:
        """Take the codecs of a layer, None where it has none, and who is told of what its queries read."""
        watch = partial(watched, {} if read is None else {id(codecs): read})
        simulation = Simulation(self._plan.sinks, self._plan.recent, watch=watch)
        self._layer = None if codecs is None else SimulatedLayer(codecs, self._tokens, simulation)

    def attend(
        self, module: Any, own: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self._layer is None:
            return compat.own_attention(module, own)(module, query, key, value, mask, **kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return simulated_attention(self._layer, query, key, value, mask, scaling, **extras_of(kwargs)), None


def _arrays(maps: SiteMaps) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.numpy() for name, tensor in vars(maps).items()}


def _of_arrays(arrays: dict[str, Any]) -> SiteMaps:
    tensors: dict[str, Any] = {name: None if array is None else torch.tensor(array) for name, array in arrays.items()}
    return SiteMaps(**tensors)
