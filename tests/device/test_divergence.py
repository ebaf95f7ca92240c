"""On a GPU the kernel of the losses of `heal` gives the sums and gradients of torch, of vocabularies as they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvcompress.heal.distil import divergence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run tests/gpu")


@pytest.mark.parametrize(("rows", "n"), [(64, 262144), (300, 49152), (7, 1000)])
@pytest.mark.parametrize(("kl_loss", "text_loss"), [(1.0, 0.0), (1.0, 0.05), (0.5, 2.0)])
def test_sums_and_gradients_are_those_of_torch(rows: int, n: int, kl_loss: float, text_loss: float) -> None:
    generator = torch.Generator("cuda").manual_seed(n)
    teacher, noise = (torch.randn(rows, n, device="cuda", generator=generator) for _ in range(2))
    teacher = (3 * teacher).bfloat16()
    student = (teacher + 0.1 * noise).bfloat16()
    labels = torch.randint(0, n, (rows,), device="cuda", generator=generator)
    found, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    got = divergence(found, teacher, labels, kl_loss=kl_loss, text_loss=text_loss)
    got.backward()
    q, p = exact.log_softmax(-1), teacher.double().log_softmax(-1)
    wanted = kl_loss * functional.kl_div(q, p, log_target=True, reduction="sum")
    wanted = wanted + text_loss * functional.nll_loss(q, labels, reduction="sum")
    wanted.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert found.grad is not None and exact.grad is not None
    error = (found.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3  # of bfloat16
