"""KL divergence between two models' next-token distributions beside the text's own loss, and the gradient of both, in
one reading of their logits.

Written out, a vocabulary of 50 to 260 thousand makes a dozen passes over float32 logits the largest part of a
distillation's time.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 4096


@triton.jit(do_not_specialize=["n_columns", "kl_weight", "text_weight"])
def divergence_kernel(
    student, teacher, labels, gradient, sums, row_stride, n_columns, kl_weight, text_weight, WIDTH: tl.constexpr
):
    """sums: float32 [rows], of every row kl_weight * KL(softmax of teacher || softmax of student) + text_weight * its
    label's negative log-likelihood by the student, in nats.

    student, teacher, gradient: [rows, n_columns] of one dtype and stride; gradient: of each row's sum with respect to
    student's logits. labels: int64 [rows]. Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64) * row_stride
    label = tl.load(labels + tl.program_id(0))
    student_most = tl.full([], -float("inf"), tl.float32)
    teacher_most = tl.full([], -float("inf"), tl.float32)
    student_sum = tl.full([], 0.0, tl.float32)
    teacher_sum = tl.full([], 0.0, tl.float32)
    for start in range(0, n_columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        s = tl.load(student + row + column, mask=column < n_columns, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + row + column, mask=column < n_columns, other=-float("inf")).to(tl.float32)
        most = tl.maximum(student_most, tl.max(s, 0))
        student_sum = student_sum * tl.exp(student_most - most) + tl.sum(tl.exp(s - most), 0)
        student_most = most
        most = tl.maximum(teacher_most, tl.max(t, 0))
        teacher_sum = teacher_sum * tl.exp(teacher_most - most) + tl.sum(tl.exp(t - most), 0)
        teacher_most = most
    student_log = student_most + tl.log(student_sum)
    teacher_log = teacher_most + tl.log(teacher_sum)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, n_columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        there = column < n_columns
        s = tl.load(student + row + column, mask=there, other=0.0).to(tl.float32) - student_log
        t = tl.load(teacher + row + column, mask=there, other=0.0).to(tl.float32) - teacher_log
        p = tl.exp(t)
        is_label = (column == label).to(tl.float32)
        total += tl.sum(tl.where(there, kl_weight * p * (t - s) - text_weight * is_label * s, 0.0), 0)
        slope = (kl_weight + text_weight) * tl.exp(s) - kl_weight * p - text_weight * is_label
        tl.store(gradient + row + column, slope.to(gradient.dtype.element_ty), mask=there)
    tl.store(sums + tl.program_id(0), total)


class Divergence(torch.autograd.Function):
    """Divergence.apply(student, teacher, labels, kl_weight, text_weight): the sum over rows of logits [rows, n] of
    kl_weight * KL(teacher || student) + text_weight * the labels' negative log-likelihood, float32."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, kl_weight: float, text_weight: float
    ) -> Tensor:
        student, teacher = student.contiguous(), teacher.to(student.dtype).contiguous()
        gradient = torch.empty_like(student)
        sums = torch.empty(len(student), dtype=torch.float32, device=student.device)
        divergence_kernel[(len(student),)](
            student, teacher, labels.contiguous(), gradient, sums, student.stride(0), student.shape[1],
            float(kl_weight), float(text_weight), WIDTH=_WIDTH, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(gradient)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None
