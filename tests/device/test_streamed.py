"""A model whose layers come from disk to a GPU: the moments of the pass that holds it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import empty_moments
from kvcompress.calibration.streamed import collect_streamed
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.resident import StreamedModel
from tests.tiny_models import random_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run tests/gpu")
pytest.importorskip("accelerate")
SEEN = {"sinks": 2, "recent": 4, "seed": 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_moments_are_those_of_the_whole_model(tiny_checkpoint: Any, dtype: str) -> None:
    windows = random_ids(11, 40, seed=7)  # more than are on their way at a time
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        group = checkpoint.spec.layers[0].n_kv_heads
        streamed = StreamedModel(checkpoint, dtype=getattr(torch, dtype), device=torch.device("cuda"))
        ours = empty_moments(checkpoint.spec, {}, group=group)
        ours = collect_streamed(streamed, checkpoint.spec, windows, ours, **SEEN)
        model = load_weights(checkpoint.path, dtype=dtype, device="cuda")
        whole = empty_moments(checkpoint.spec, {}, group=group, device="cuda")
        whole = collect_moments(model, checkpoint.spec, windows, whole, **SEEN)
    for site, sums in whole.sites.items():
        mine = ours.sites[site]
        assert mine.n_tokens == sums.n_tokens
        for a, b in zip((mine.total, *mine.outer, *mine.fisher), (sums.total, *sums.outer, *sums.fisher), strict=True):
            assert torch.equal(a.cpu(), b.cpu())
