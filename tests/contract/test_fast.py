"""The kernels in the cache's service, in Triton's interpreter: what the torch reference gives, through a model."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.kernels import packing_ahead, site
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.model_spec import PARTS, Part
from kvcompress.runtime import attach, fast
from kvcompress.runtime.attach import attach_plan, attachment_of
from tests.contract.test_static import assert_replays_follow
from tests.tiny_models import PAD, random_ids


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    def make(**options: Any) -> Any:
        options = {"keep": 0.5, "sinks": 2, "recent": 5, "policy": "uniform", "key_basis": "frequency"} | options
        return attach_plan(tiny_model("llama-bf16"), *tiny_plan("llama-bf16", **options))

    return make


def last_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, n_steps: int) -> torch.Tensor:
    """Prefill, then decode token by token: [batch, n_steps, vocabulary]."""
    cache, n_prompt = attachment_of(model).new_cache(), ids.shape[1] - n_steps
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    logits = []
    with torch.no_grad():
        for start, stop in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, ids.shape[1]))]:
            logits.append(
                model(
                    ids[:, start:stop],
                    attention_mask=None if mask is None else mask[:, :stop],
                    position_ids=None if positions is None else positions[:, start:stop],
                    past_key_values=cache,
                ).logits[:, -1:]
            )
    return torch.cat(logits[1:], 1).float()


@pytest.mark.parametrize("ranks_only", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_give_what_the_reference_gives(attached: Any, ranks_only: bool, padded: bool, monkeypatch: Any) -> None:
    model = attached(ranks_only=ranks_only).to(torch.float16)  # the interpreter multiplies no bfloat16
    ids, mask = random_ids(2, 75), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        ids = ids.masked_fill(mask == 0, PAD)
    reference = last_logits(model, ids, mask, 3)
    calls = []
    attend = fast.attention

    def counted(*args: Any) -> Any:
        output = attend(*args)
        calls.append(output is not None)
        return output

    monkeypatch.setattr(fast, "kernels_apply", lambda device: True)
    monkeypatch.setattr(fast, "attention", counted)
    fused = last_logits(model, ids, mask, 3)
    assert sum(calls) == 3 * len(model.model.layers)
    assert (fused - reference).norm() / reference.norm() < 0.01  # both round to float16 after every layer


@pytest.mark.parametrize("ranks_only", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("options", [{}, {"key_basis": "latent", "turn": 128}])
def test_packing_gives_what_the_reference_gives(
    attached: Any, ranks_only: bool, part: Part, options: dict[str, Any], monkeypatch: Any
) -> None:
    codec = getattr(attachment_of(attached(ranks_only=ranks_only, **options)).codecs[0], part)
    assert (codec.tiles is not None) == ("turn" in options)
    x = torch.randn(2, 64, codec.encoder.shape[0] * codec.encoder.shape[2])
    reference = codec.unpack(codec.pack(x))
    monkeypatch.setattr(site, "kernels_apply", lambda device: True)
    packed = SiteKernels(codec, 2).pack(x)
    assert packed is not None and packed.shape == codec.pack(x).shape
    difference = (codec.unpack(packed) - reference).abs()
    # the projection is in float16: some numbers fall on the other side of a step, and with them a few gains
    assert (difference > 0.02).float().mean() < 0.1
    assert difference.norm() / reference.norm() < 0.02


def test_kernels_are_compiled_once_before_the_first_tokens(attached: Any, monkeypatch: Any) -> None:
    """A variant of what packs for each set of levels, and where no kernel is used none."""
    compile_packing, compiled = packing_ahead.compile_packing, []
    monkeypatch.setattr(packing_ahead, "compile_packing", lambda sites: compiled.append(compile_packing(sites)) or 1)
    model = attached()
    attachment = attachment_of(model)
    attachment.new_cache()
    assert compiled == []
    monkeypatch.setattr(attach, "kernels_apply", lambda device: True)
    levels = {
        (part, frozenset(bits for bits, *_ in codec.classes))
        for layer in attachment.codecs
        for part in PARTS
        if (codec := getattr(layer, part)) is not None
    }
    attachment.generation_cache(random_ids(1, 8), max_new_tokens=2)
    attachment.new_cache()
    assert 1 <= compiled[0] <= len(levels) and len(compiled) == 1


def test_one_recorded_step_serves_them_all(attached: Any, monkeypatch: Any) -> None:
    """Over a cache of a fixed capacity, at a few of many steps: nothing encoded yet, and evictions."""
    model = attached().to(torch.float16)
    ids, n_prompt, replayed = random_ids(2, 80), 10, {12, 36, 37, 38, 70, 79}
    recording, decoder = assert_replays_follow(
        model, ids, n_prompt, replayed, "kvcompress.runtime.fast.kernels_apply", monkeypatch
    )
    assert recording.n_replays == len(replayed) - 1
    assert decoder.cache.layers[0].n_encoded == 64
