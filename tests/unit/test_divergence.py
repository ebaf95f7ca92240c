"""KL between two logits and the text's own loss: the kernel, in Triton's interpreter, against torch's functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from kvcompress.kernels import divergence as kernels


@pytest.mark.parametrize("n_columns", [5, 64, 150])
@pytest.mark.parametrize(("kl_weight", "text_weight"), [(1.0, 0.0), (1.0, 0.05), (0.5, 2.0)])
def test_sums_and_gradients_are_those_of_torch(
    n_columns: int, kl_weight: float, text_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WIDTH", 64)
    generator = torch.Generator().manual_seed(n_columns)
    student, teacher = (3 * torch.randn(3, n_columns, generator=generator) for _ in range(2))
    student[1] += 200.0  # softmax does not see it, a plain exponential would overflow
    found, expected = (student.clone().requires_grad_() for _ in range(2))
    with torch.no_grad():
        goal = teacher.log_softmax(-1)
    labels = torch.tensor([0, n_columns - 1, n_columns // 2])
    kl = functional.kl_div(expected.log_softmax(-1), goal, log_target=True, reduction="sum")
    wanted = kl_weight * kl + text_weight * functional.cross_entropy(expected, labels, reduction="sum")
    (2 * wanted).backward()
    got = kernels.Divergence.apply(found, teacher, labels, kl_weight, text_weight)
    (2 * got).backward()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
