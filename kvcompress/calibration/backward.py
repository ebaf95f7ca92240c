"""Gradients at the taps of all layers, layer by layer where that is exact, else through the whole model at once.

Layer by layer, each layer is recomputed from its saved input, so that beyond the model and the layers' inputs only one
layer's activations of one window are alive. That is exact where each layer's output is the next one's input and nothing
else passes from layer to layer; whether it is so is seen on a few tokens, against the whole model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import compat
from kvcompress.calibration.taps import LayerTap, Taps
from kvcompress.compat import Cache
from kvcompress.errors import CalibrationError
from kvcompress.model.head import after_layers

#: Tokens on which the two ways are compared; more than a window of 1, so that some keys are far.
_COMPARED_TOKENS = 24

TailGradient = Callable[[Tensor], Tensor]
"""final hidden states [1, n_tokens, d_model] -> d(loss)/d(them)."""
Gradients = Iterator[tuple[int, LayerTap, Tensor, Tensor]]
"""(layer of the cache, its tap, d(loss)/d(far keys), d(loss)/d(far values)), of every layer with a site."""


def backward_pass(model: Any, taps: Taps, *, by_layer: bool) -> Callable[[Tensor, TailGradient], Gradients]:
    """Return the pass, layer by layer where `goes_by_layer` says so."""
    layers = _layers(model) if by_layer else None
    if layers is None:
        return lambda ids, tail: _whole(model, taps, ids, tail)
    return lambda ids, tail: _by_layer(model, layers, taps, ids, tail)


def goes_by_layer(model: Any, taps: Taps) -> bool:
    """Return whether the pass layer by layer is exact for this model."""
    layers = _layers(model)
    if layers is None:
        return False
    ids = torch.arange(3, 3 + _COMPARED_TOKENS, device=next(model.parameters()).device)[None]
    ids = ids % model.get_input_embeddings().num_embeddings

    def same_direction(final: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(final.shape, generator=generator).to(final)

    recent, taps.recent, taps.same_steps = taps.recent, 1, True  # else rounding of 16 bits hides what is compared
    try:
        ours = {layer: grads for layer, _, *grads in _by_layer(model, layers, taps, ids, same_direction)}
        theirs = {layer: grads for layer, _, *grads in _whole(model, taps, ids, same_direction)}
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return False
    finally:
        taps.recent, taps.same_steps = recent, False
    return ours.keys() == theirs.keys() and all(
        _agree(a, b) for i in ours for a, b in zip(ours[i], theirs[i], strict=True)
    )


def _agree(a: Tensor, b: Tensor) -> bool:
    within = 1e-3 if a.dtype == torch.float32 else 5e-2
    return bool((a - b).float().norm() <= within * b.float().norm() + 1e-12)


def _layers(model: Any) -> nn.ModuleList | None:
    """Return the decoder's list of layers, or None where it has none of the expected length."""
    n_layers = compat.text_config(model).num_hidden_layers
    lists = [m for m in compat.decoder_of(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return lists[0] if lists else None


@dataclass
class _Run:
    """What a forward left: inputs of each layer as (args, kwargs), its last layer's output."""

    inputs: list[Any]
    output: Any = None


def _by_layer(model: Any, layers: nn.ModuleList, taps: Taps, ids: Tensor, tail: TailGradient) -> Gradients:
    with _saved(layers) as run, torch.no_grad():
        decode(model, taps, ids)
    is_tuple = isinstance(run.output, tuple)
    hidden = (run.output[0] if is_tuple else run.output).detach().requires_grad_(True)
    check_finite(hidden)
    with torch.enable_grad():
        final = after_layers(model, list(layers), hidden, ids, in_tuple=is_tuple)
    gradient = torch.autograd.grad(final, hidden, tail(final.detach()))[0]
    for index in reversed(range(len(layers))):
        args, kwargs = run.inputs[index]
        run.inputs[index] = None
        hidden = args[0] if args else kwargs["hidden_states"]
        gradient, found = layer_gradients(layers[index], taps, hidden, (args, kwargs), gradient)
        yield from found


def layer_gradients(
    layer: nn.Module, taps: Taps, hidden: Tensor, call: Any, gradient: Tensor
) -> tuple[Tensor, list[tuple[int, LayerTap, Tensor, Tensor]]]:
    """Return (d(loss)/d(a layer's input), what its taps have), from d(loss)/d(its output), by running it again.

    call: (args, kwargs) with which the layer was called; `hidden` stands for the hidden states in them.
    """
    taps.layers.clear()
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        output = call_layer(layer, taps, hidden, call)
    leaves = [leaf for tap in taps.layers.values() for pair in tap.far for leaf in pair]
    gradient, *grads = torch.autograd.grad(output, [hidden, *leaves], gradient, allow_unused=True)
    return gradient, list(_summed(taps.layers, leaves, grads))


def call_layer(layer: nn.Module, taps: Taps, hidden: Tensor, call: Any) -> Tensor:
    """Return the hidden states that a layer makes of `hidden`, called as it was in a forward of its model."""
    args, kwargs = call
    cache = taps.cache()  # a fresh one: what linear layers keep in theirs is not of this run
    args = [cache if isinstance(a, Cache) else a for a in args[1:]]
    output = layer(hidden, *args, **_with_cache(kwargs, cache))
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _with_cache(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    given = {name: cache if isinstance(value, Cache) else value for name, value in kwargs.items()}
    given.pop("hidden_states", None)
    return given


def _whole(model: Any, taps: Taps, ids: Tensor, tail: TailGradient) -> Gradients:
    taps.layers.clear()

    def with_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True) + 0

    handle = model.get_input_embeddings().register_forward_hook(with_gradient)
    try:
        with torch.enable_grad():
            final = decode(model, taps, ids)[0]
    finally:
        handle.remove()
    check_finite(final)
    cut = [i for i, tap in taps.layers.items() if not all(leaf.requires_grad for pair in tap.far for leaf in pair)]
    if cut or not final.requires_grad:
        raise CalibrationError(
            f"no gradient reaches layer {(cut or [0])[0]}'s keys and values: the model computes on the way in "
            "steps that have none, as some quantised weights do. Compress the 16-bit model, its maps attach."
        )
    leaves = [leaf for tap in taps.layers.values() for pair in tap.far for leaf in pair]
    grads = torch.autograd.grad(final, leaves, tail(final.detach()), allow_unused=True)
    yield from _summed(taps.layers, leaves, grads)


def decode(model: Any, taps: Taps, ids: Tensor) -> Any:
    """Return what the decoder makes of ids, with a cache of the taps."""
    decoder = compat.decoder_of(model)
    return decoder(input_ids=ids, use_cache=True, **compat.cache_argument(decoder, taps.cache()))


def _summed(found: dict[int, LayerTap], leaves: list[Tensor], grads: Any) -> Gradients:
    """Yield the gradients of every layer, those of all its readers added up."""
    of = {id(leaf): torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)}
    for index, tap in sorted(found.items(), reverse=True):
        keys, values = ([of[id(leaf)] for leaf in side] for side in zip(*tap.far, strict=True))
        yield index, tap, torch.stack(keys).sum(0), torch.stack(values).sum(0)


@contextmanager
def _saved(layers: nn.ModuleList) -> Iterator[_Run]:
    """Yield what is filled during a forward: every layer's inputs and the last one's output."""
    run = _Run([None] * len(layers))

    def save(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.inputs[index] = (args, kwargs)

        return hook

    def save_output(_module: nn.Module, _args: Any, output: Any) -> None:
        run.output = output

    handles = [layer.register_forward_pre_hook(save(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(save_output))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def check_finite(hidden: Tensor) -> None:
    """Raise CalibrationError for hidden states that are NaN or infinite."""
    if not hidden.isfinite().all():
        raise CalibrationError(
            "the model's activations are NaN or infinite on the calibration text. "
            "Try --dtype float32, and check the checkpoint's weights."
        )
