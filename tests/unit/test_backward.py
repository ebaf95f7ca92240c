"""Gradients at the cache: layer by layer, they are those of the whole model at once, and the pass chooses rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kvcompress.calibration import backward
from kvcompress.calibration.taps import tapped
from kvcompress.errors import CalibrationError, UnsupportedModelError
from kvcompress.model.probe import probe
from tests.models.small import EARLIER, needs, small_model

#: (type, whether layer by layer is exact): plain, experts, linear attention, latent attention, windows, soft caps,
#: sinks as parameters, four streams, older files without the interface, shared blocks, layers that read others' cache.
TYPES = [
    ("llama", True), ("qwen3_moe", True), ("qwen3_5_text", True), ("deepseek_v3", True), ("gemma3_text", True),
    ("gemma2", True), ("gpt_oss", True), ("gemma3n_text", True), ("bloom", True), ("gpt2", True), ("zamba", True),
    ("gemma3n_shared", False),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "by_layer"), TYPES)
def test_layer_by_layer_or_whole(model_type: str, by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(model_type.replace("_shared", "_text"))
    try:
        model = small_model(model_type).requires_grad_(False) if model_type != "gemma3n_shared" else shared()
        spec = probe(model)
    except UnsupportedModelError as error:
        if not EARLIER:
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with tapped(model, spec, 8) as taps:
        run = backward.backward_pass(model, taps, by_layer=backward.goes_by_layer(model, taps))
        used: list[str] = []
        for name in ("_by_layer", "_whole"):
            own = getattr(backward, name)
            monkeypatch.setattr(backward, name, lambda *a, _own=own, _n=name: (used.append(_n), _own(*a))[1])
        found = {layer: (tap, *grads) for layer, tap, *grads in run(ids, falling)}
        whole = {layer: grads for layer, _, *grads in backward._whole(model, taps, ids, falling)}
    assert EARLIER or used[0] == ("_by_layer" if by_layer else "_whole")
    assert sorted(found) == [a.layer for a in spec.layers]
    for layer, (tap, *grads) in found.items():
        assert tap.key.shape[2] == tap.value.shape[2] == 40
        for ours, theirs in zip(grads, whole[layer], strict=True):
            assert float(theirs.norm()) > 0
            assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


def shared() -> Any:
    """Gemma 3n whose last two layers read what earlier ones cached."""
    return small_model("gemma3n_text", num_kv_shared_layers=2, num_hidden_layers=4).requires_grad_(False)


def falling(final: Tensor) -> Tensor:
    """A gradient that differs from number to number."""
    return torch.linspace(1, -1, final.numel()).reshape(final.shape).to(final) ** 3


def test_only_far_queries_count() -> None:
    """With a window as long as the text nobody reads a compressed key; the last tokens are near to all readers."""
    model: Any = small_model("llama").requires_grad_(False)
    spec, ids = probe(model), torch.arange(3, 33)[None]
    for recent, n_read in ((30, 0), (9, 20)):
        with tapped(model, spec, recent) as taps:
            layers = list(backward.backward_pass(model, taps, by_layer=True)(ids, falling))
            assert len(layers) == model.config.num_hidden_layers
            for _, _, key, value in layers:
                assert bool((key[:, :, n_read:] == 0).all()) and bool((value[:, :, n_read:] == 0).all())
                assert n_read == 0 or float(value[:, :, :n_read].norm()) > 0


class Rounding(nn.Linear):
    """A linear layer that rounds what comes in, in a step without a gradient, as quantised activations are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward((x * 4096).round() / 4096)


def test_gradients_pass_layers_that_round() -> None:
    """They are those of the same weights without rounding; where nothing says that it rounds, one line does."""
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))

    def gradients(model: Any) -> list[Tensor]:
        with tapped(model, probe(model), 8) as taps:
            run = backward.backward_pass(model, taps, by_layer=backward.goes_by_layer(model, taps))
            return [grad for _, _, *grads in run(ids, falling) for grad in grads]

    model: Any = small_model("llama").requires_grad_(False)
    exact = gradients(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounding
    with pytest.raises(CalibrationError, match="no gradient reaches layer 0's keys and values"):
        gradients(model)
    model.is_quantized = True
    for ours, theirs in zip(gradients(model), exact, strict=True):
        assert 0 < float((ours - theirs).norm()) < 0.05 * float(theirs.norm())
