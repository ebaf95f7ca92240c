"""One pass over the calibration text: forward, labels sampled from the model, backward to what was cached.

No gradient of a weight is computed: with the recomputation of layers (backward.py) the cost is about that of an
ordinary forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.backward import backward_pass, goes_by_layer
from kvcompress.calibration.drawing import drawn
from kvcompress.calibration.leverage import leverages
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.taps import LayerTap, tapped, unplanned_attention
from kvcompress.errors import CalibrationError
from kvcompress.model.head import logits_of
from kvcompress.model.model_spec import PARTS, ModelSpec, Site
from kvcompress.model.probe import matched, probe, signature
from kvcompress.model.rope import Rotary

#: Rows of logits that are alive at once; [256, 150k] float32 is 150 MB.
_LOGIT_ROWS = 256
#: Tokens of each site that are kept as they are, over all windows: 4 * n bytes each; and for each so many that are
#: weighed by their gradients one that is not.
_N_SAMPLES, _WEIGHED_FOR_ONE = 2048, 4

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""
Save = Callable[[Moments], None]
"""Called after every window with the sums so far; see parts.Seldom."""


def collect_moments(
    model: nn.Module | Summing,
    spec: ModelSpec,
    windows: Tensor,
    moments: Moments,
    *,
    sinks: int,
    recent: int,
    seed: int,
    which: Sequence[int] | None = None,
    save: Save | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Add windows to `moments` and return it: those of `which`, or all from `moments.n_windows` on.

    model: or one that is ready (`begun` with the same spec and `recent`), which takes several forwards.
    spec: the sites that are expected; their rotations are proven on the model and left in `moments`.
    windows: [n_windows, seq_len] token ids. The first `sinks` positions of a window are left out of the sums, and
    gradients count only queries more than `recent` tokens later, since the cache keeps those exact. Labels are
    sampled from the model, seeded per window, so a resumed pass gives the sums of an unbroken one. Raises
    CalibrationError if the model's activations or gradients are not finite.
    """
    summing = model if isinstance(model, Summing) else begun(model, spec, recent)
    for index in range(moments.n_windows, len(windows)) if which is None else which:
        summing.add(windows, index, moments, sinks=sinks, seed=seed)
        if progress:
            progress(moments.n_windows * windows.shape[1], windows.numel())
        if save:
            save(moments)
    check_moments(moments)
    return moments


@dataclass(frozen=True, slots=True)
class Summing:
    """A model that is ready to be calibrated: its spec is proven, and it is known whether it can go by layer."""

    model: Any
    spec: ModelSpec
    signature: tuple[float, ...]
    recent: int
    by_layer: bool

    def add(self, windows: Tensor, index: int, moments: Moments, *, sinks: int, seed: int) -> None:
        """Add one window to `moments`, whose sums come to where the layers are."""
        ids = windows[index : index + 1].to(next(self.model.parameters()).device)
        tail = partial(head_gradient, self.model, seed=label_seed(seed, index))
        n_samples = n_samples_of(index, len(windows))
        with tapped(self.model, self.spec, self.recent) as taps:
            gradients = backward_pass(self.model, taps, by_layer=self.by_layer)
            for layer, tap, *grads in gradients(ids, tail):
                add_tap(self.spec, moments, layer, tap, grads, sinks=sinks, n_samples=n_samples)
        moments.rotations, moments.signature = self.spec.rotations, self.signature
        moments.order.append(index)


def begun(model: Any, spec: ModelSpec, recent: int) -> Summing:
    """Return a model that is ready. Raises UnsupportedModelError where it is not the spec's."""
    model.requires_grad_(False)
    with unplanned_attention():
        spec = matched(probe(model), spec)
    with tapped(model, spec, recent) as taps:
        return Summing(model, spec, signature(model, spec), recent, goes_by_layer(model, taps))


def label_seed(seed: int, window: int) -> int:
    """Return the seed of a window's labels, which no other window has."""
    return seed * 1_000_003 + window


def add_tap(
    spec: ModelSpec,
    moments: Moments,
    layer: int,
    tap: LayerTap,
    grads: list[Tensor],
    *,
    sinks: int,
    n_samples: int,
) -> None:
    """Add what a layer cached of one window, and d(loss)/d(its keys and values), to the sums of its sites."""
    positions = torch.arange(tap.key.shape[2], device=tap.key.device)[None]
    for part, x, g in zip(PARTS, (tap.key, tap.value), grads, strict=True):
        site, scale = Site(layer, part), _scale(g.dtype)
        rotation = spec.attention(site).rotation
        if rotation is not None:
            # d/d(x before RoPE) = scale R^T d/d(x after); unrotate divides by the scale
            rotary = Rotary.by(rotation, x.device)
            x, g = rotary.unrotate(x, positions), rotary.unrotate(g, positions) * rotary.scale**2
        n_heads = x.shape[1]
        x, g = (t.detach().transpose(1, 2).flatten(2)[0, sinks:] for t in (x, g))
        if moments.sites[site].total.device != x.device:  # layers may be spread over several
            moments.sites[site] = moments.sites[site].to(str(x.device))
        g, sums = g.double() / scale, moments.sites[site]
        weight = leverages(g, n_heads) if sums.partitions else None  # watches (coherence.py) have none
        sums.add(x, g, weight, n_samples=n_plain(n_samples), n_weighed=n_samples)


def n_samples_of(window: int, n_windows: int) -> int:
    """Return how many weighed tokens of a window are kept: evenly over all, so that any pass keeps the same."""
    return (window + 1) * _N_SAMPLES // n_windows - window * _N_SAMPLES // n_windows


def n_plain(n_samples: int) -> int:
    """Return how many tokens are kept that are not weighed, beside n_samples of a window that are."""
    return -(-n_samples // _WEIGHED_FOR_ONE)


def head_gradient(model: Any, hidden: Tensor, *, seed: int) -> Tensor:
    """Return d(cross-entropy, summed over tokens)/d(the decoder's final hidden states), labels sampled from the model.

    hidden: [1, seq_len, hidden]. The gradient of the logits is softmax - one_hot(label), taken in chunks of rows.
    """
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], _LOGIT_ROWS):
        rows = hidden[:, start : start + _LOGIT_ROWS].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(model, rows)
        probability = logits.detach().float().softmax(-1)
        if not bool(probability.isfinite().all()):
            raise CalibrationError(
                "the model's logits are NaN or infinite on the calibration text. "
                "Try --dtype float32, and check the checkpoint's weights."
            )
        labels = drawn(probability[0], generator)
        probability[0].scatter_add_(1, labels, -torch.ones_like(labels, dtype=probability.dtype))
        gradient[:, start : start + _LOGIT_ROWS] = torch.autograd.grad(
            logits, rows, (probability * _scale(logits.dtype)).to(logits.dtype)
        )[0]
    return gradient


def _scale(dtype: torch.dtype) -> float:
    """float16 gradients of single tokens fall among the subnormals; a power of two keeps them exact."""
    return 1024.0 if dtype == torch.float16 else 1.0


def check_moments(moments: Moments) -> None:
    """Raise CalibrationError where a site was reached by no gradient, or its sums are not finite."""
    unseen = [site for site, sums in moments.sites.items() if not sums.n_tokens]
    if unseen:
        raise CalibrationError(
            f"no gradient of the loss reaches {unseen[0]} and {len(unseen) - 1} other sites, so what they may lose is "
            "not known. The model stops gradients on its way; it cannot be calibrated."
        )
    for site, sums in moments.sites.items():
        for what, tensors in (("activations", sums.outer), ("gradients", sums.fisher)):
            if not all(bool(t.isfinite().all()) for t in tensors):
                raise CalibrationError(
                    f"the {what} of {site} are NaN or infinite on the calibration text. "
                    "Try --dtype float32, and check the checkpoint's weights."
                )
