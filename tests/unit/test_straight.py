"""Gradients through linear layers that cut them, of plain and of packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvcompress.calibration import straight
from kvcompress.calibration.straight import straight_through
from tests.packed_linear import Packed


class Rounding(nn.Linear):
    """Rounds what comes in, as FP8 layers do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward((x * 16).round() / 16)


@pytest.mark.parametrize("columns", [1024, 5])
@pytest.mark.parametrize("kind", ["rounding", "packed"])
def test_the_gradient_goes_through_the_weights(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight, "_COLUMNS", columns)
    torch.manual_seed(0)
    plain = nn.Linear(24, 12)
    packed = Packed(plain)
    plain.weight.data = packed.weights()
    cut = Rounding(24, 12)
    cut.load_state_dict(plain.state_dict())
    model: Any = nn.Sequential(packed if kind == "packed" else cut)
    x, back = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 12)
    (expected,) = torch.autograd.grad(plain(x), x, back)
    model.is_quantized = True
    with straight_through(model):
        (found,) = torch.autograd.grad(model(x), x, back)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not model(x).requires_grad  # given back as it was
    model.is_quantized = False
    with straight_through(model):
        assert not model(x).requires_grad
