"""One pass over the calibration text: forward, labels sampled from the model, backward layer by layer.

The backward pass recomputes one layer at a time from its saved input, so that beyond the model and the
layers' inputs only one layer's activations of one window are alive. No gradient of a weight is computed:
with the recomputation the cost is about that of an ordinary forward and backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.attention import FarTaps, split_attention
from kvcompress.calibration.moments import Moments
from kvcompress.errors import CalibrationError
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Site
from kvcompress.model.rope import Rotary

#: Rows of logits that are alive at once; [256, 150k] float32 is 150 MB.
_LOGIT_ROWS = 256
#: Tokens of each site that are kept as they are, over all windows: 4 * n bytes each.
_N_SAMPLES = 2048

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


def collect_moments(
    model: nn.Module,
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    partial_file: Path | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Add every window from `moments.n_windows` on to `moments` and return it.

    windows: [n_windows, seq_len] token ids. The first `sinks` positions of a window are left out of the sums, and
    gradients count only queries more than `recent` tokens later, since the cache keeps those exact. Labels are
    sampled from the model, seeded per window, so a resumed pass gives the sums of an unbroken one. With
    `partial_file` the sums are saved now and then (at most 5% of the time). Raises CalibrationError if the
    model's activations or gradients are not finite.
    """
    device = next(model.parameters()).device
    model.requires_grad_(False)
    done = moments.n_windows
    last_save, save_seconds = time.monotonic(), 0.5
    with split_attention(model, recent) as taps:
        for index in range(done, len(windows)):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            # evenly over windows, so that an unbroken pass and a resumed one keep the same tokens
            n_samples = (index + 1) * _N_SAMPLES // len(windows) - index * _N_SAMPLES // len(windows)
            window = windows[index : index + 1].to(device)
            _add_window(model, spec, window, moments, sinks, generator, taps, n_samples)
            moments.n_windows = index + 1
            if progress:
                progress((index + 1) * windows.shape[1], windows.numel())
            if partial_file and time.monotonic() - last_save > 20 * save_seconds:
                started = time.monotonic()
                moments.save(partial_file)
                last_save = time.monotonic()
                save_seconds = last_save - started
    _check_finite(moments)
    return moments


def _add_window(
    model: Any,
    spec: ModelSpec,
    ids: Tensor,
    moments: Moments,
    sinks: int,
    generator: torch.Generator,
    taps: FarTaps,
    n_samples: int,
) -> None:
    decoder = model.get_decoder()
    rotary = Rotary.of(model)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with _saved_inputs(decoder) as (inputs, final), torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    if not final[0].isfinite().all():
        raise CalibrationError(
            "the model's activations are NaN or infinite on the calibration text. "
            "Try --dtype float32, and check the checkpoint's weights."
        )
    gradient = _head_gradient(model, decoder, final[0], generator)
    for attention in reversed(spec.layers):
        layer_input = inputs[attention.layer]
        inputs[attention.layer] = None
        with _tapped(model, attention) as outputs:
            gradient, key_gradient, value_gradient = _layer_backward(
                decoder.layers[attention.layer], layer_input, gradient, taps
            )
        if attention.rotary_dim:  # d/d(key before RoPE) = scale R^T d/d(key after); unrotate divides by the scale
            key_gradient = rotary.unrotate(key_gradient, positions) * rotary.scale**2
        for part, g in (("key", key_gradient), ("value", value_gradient)):
            projection = attention.projection(part)  # type: ignore[arg-type]
            x = outputs[projection.module].detach().flatten(2)[0, sinks:, projection.start : projection.stop]
            g = g.transpose(1, 2).flatten(2)[0, sinks:].double() / _scale(gradient.dtype)
            moments.sites[Site(attention.layer, part)].add(x, g, n_samples=n_samples)  # type: ignore[arg-type]


@contextmanager
def _saved_inputs(decoder: Any) -> Iterator[tuple[list[Any], list[Tensor]]]:
    """Yield (inputs of every layer as (args, kwargs), [input of the final norm]), filled during a forward pass."""
    inputs: list[Any] = [None] * len(decoder.layers)
    final: list[Tensor] = []

    def save(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = (args, kwargs)

        return hook

    handles = [layer.register_forward_pre_hook(save(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)]
    handles.append(decoder.norm.register_forward_pre_hook(lambda _m, args: final.append(args[0])))
    try:
        yield inputs, final
    finally:
        for handle in handles:
            handle.remove()


def _head_gradient(model: Any, decoder: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return d(cross-entropy, summed over tokens)/d(hidden before the final norm), labels sampled from the model.

    hidden: [1, seq_len, hidden]. The gradient of the logits is softmax - one_hot(label), taken in chunks of rows.
    """
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        normed = decoder.norm(hidden)
    gradient = torch.empty_like(normed)
    for start in range(0, normed.shape[1], _LOGIT_ROWS):
        rows = normed[:, start : start + _LOGIT_ROWS].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model.lm_head(rows)
        probability = logits.detach().float().softmax(-1)
        if not bool(probability.isfinite().all()):
            raise CalibrationError(
                "the model's logits are NaN or infinite on the calibration text. "
                "Try --dtype float32, and check the checkpoint's weights."
            )
        labels = torch.multinomial(probability[0], 1, generator=generator)
        probability[0].scatter_add_(1, labels, -torch.ones_like(labels, dtype=probability.dtype))
        gradient[:, start : start + _LOGIT_ROWS] = torch.autograd.grad(
            logits, rows, (probability * _scale(logits.dtype)).to(logits.dtype)
        )[0]
    return torch.autograd.grad(normed, hidden, gradient)[0]


def _layer_backward(
    layer: nn.Module, layer_input: tuple[tuple[Any, ...], dict[str, Any]], gradient: Tensor, taps: FarTaps
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute one layer and return dL/d(its input), dL/d(far keys after RoPE) and dL/d(far values)."""
    args, kwargs = layer_input
    hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
    with torch.enable_grad():
        output = layer(hidden, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": hidden})
    output = output[0] if isinstance(output, tuple) else output
    assert taps.key is not None and taps.value is not None
    grads = torch.autograd.grad(output, [hidden, taps.key, taps.value], gradient)
    taps.key = taps.value = None
    return grads[0], grads[1], grads[2]


@contextmanager
def _tapped(model: nn.Module, attention: AttentionSpec) -> Iterator[dict[str, Tensor]]:
    """Yield {module path: its output}, for the modules whose outputs hold the layer's keys and values."""
    outputs: dict[str, Tensor] = {}

    def tap(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            outputs[path] = output

        return hook

    paths = {attention.key.module, attention.value.module}
    handles = [model.get_submodule(path).register_forward_hook(tap(path)) for path in sorted(paths)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _scale(dtype: torch.dtype) -> float:
    """float16 gradients of single tokens fall among the subnormals; a power of two keeps them exact."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _check_finite(moments: Moments) -> None:
    for site, sums in moments.sites.items():
        for what, tensors in (("activations", sums.outer), ("gradients", sums.fisher)):
            if not all(bool(t.isfinite().all()) for t in tensors):
                raise CalibrationError(
                    f"the {what} of {site} are NaN or infinite on the calibration text. "
                    "Try --dtype float32, and check the checkpoint's weights."
                )
