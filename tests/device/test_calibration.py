"""What calibration does otherwise on a GPU: fused attention of 16 bits, and recorded steps of sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.calibration import attention, sampling
from kvcompress.calibration.sampled_steps import FixedSteps
from kvcompress.calibration.sampling import sample_windows
from tests.tiny_models import build_tokenizer, random_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run tests/gpu")
RECENT = 64


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (4, 4, 128), (9, 3, 64)])
def test_fused_attention_is_that_of_the_steps(heads: int, kv_heads: int, width: int) -> None:
    """No further from float64 than the steps in bfloat16 are, and the same every time."""
    torch.manual_seed(0)
    n = 700
    given = [torch.randn(1, h, n, width, device="cuda") for h in (heads, kv_heads, kv_heads)]
    given[0] *= width**-0.5
    gradient = torch.randn(1, n, heads, width, device="cuda")

    def found(dtype: torch.dtype, *, fused: bool) -> list[torch.Tensor]:
        query, key, value = (t.to(dtype) for t in given)
        leaves = [t.clone().requires_grad_(True) for t in (query, key, key, value, value)]
        assert attention.is_fused(query, key, value) == (dtype == torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(attention, "is_fused", lambda *_: False)
            output = attention.near_far_attention(leaves[0], leaves[1:3], leaves[3:], None, RECENT)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(dtype))]

    exact = found(torch.float64, fused=False)
    steps, ours, again = (found(torch.bfloat16, fused=f) for f in (False, True, True))
    for true, one, other, same in zip(exact, steps, ours, again, strict=True):
        errors = [float((t.double() - true).norm() / true.norm()) for t in (one, other)]
        assert errors[1] <= 1.2 * errors[0] + 1e-4 and torch.equal(other, same)


def test_sampled_steps_are_recorded(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama-gqa").cuda(), build_tokenizer()
    with torch.no_grad():
        steps, ids = FixedSteps(model, 3, 12), random_ids(3, 12, seed=1).cuda()
        for i in range(12):
            logits = steps(ids[:, i : i + 1])
        expected = model(input_ids=ids).logits[:, -1]
    assert steps.recorded and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    found = sample_windows(model, tokenizer, 5, 40, seed=3, batch=2)
    monkeypatch.setattr(sampling, "can_be_fixed", lambda *_: False)
    assert float((found == sample_windows(model, tokenizer, 5, 40, seed=3, batch=2)).float().mean()) > 0.9
