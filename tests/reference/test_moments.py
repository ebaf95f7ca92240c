"""The calibration pass against one dense backward pass through an attention written for this test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvcompress.bases import BASES
from kvcompress.calibration import fisher
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments, usable_partitions
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Projection, Site
from tests.tiny_models import random_ids

FAMILIES = [
    "llama-gqa", "llama-mqa", "llama-bias", "llama-tied", "llama-yarn", "mistral-sliding",
    "qwen2", "qwen3", "phi3", "phi3-partial", "smollm3",
]  # fmt: skip
SINKS = 2


class FarOffsets:
    """Zero offsets of every layer's keys (before RoPE) and values, seen by far queries only.

    The gradient of the loss in them is what a change of the cached key or value does to the loss.
    """

    def __init__(self, model: Any, ids: Tensor, recent: int) -> None:
        self.recent, self.positions = recent, torch.arange(ids.shape[1])[None]
        self.embedding = model.get_decoder().rotary_emb
        self.rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, n = module.layer_idx, key.shape[2]
        self.keys[layer] = torch.zeros_like(key, requires_grad=True)
        self.values[layer] = torch.zeros_like(value, requires_grad=True)
        offset = self.keys[layer]
        if getattr(module, "use_rope", True):
            cos, sin = self.embedding(value, self.positions)
            offset = self.rotate(offset, offset, cos, sin)[1]
        groups = query.shape[1] // key.shape[1]
        keys = [k.repeat_interleave(groups, 1) for k in (key, key + offset)]
        values = [v.repeat_interleave(groups, 1) for v in (value, value + self.values[layer])]
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        near = distance <= self.recent
        visible = distance >= 0 if mask is None else mask
        scores = torch.where(near, *(query @ k.transpose(2, 3) for k in keys)) * scaling
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        output = (weights * near) @ values[0] + (weights * ~near) @ values[1]
        return output.transpose(1, 2), None


@contextmanager
def oracle_attention(model: Any, offsets: FarOffsets) -> Iterator[None]:
    AttentionInterface.register("far_offsets_oracle", offsets.attention)
    AttentionMaskInterface.register("far_offsets_oracle", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("far_offsets_oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def dense_moments(
    model: Any, spec: ModelSpec, window: Tensor, labels: Tensor, recent: int
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Return (x, g) [n_tokens, n] of every site of one window, from one ordinary backward pass in float64."""
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out, path=path: outputs.__setitem__(path, out))
        for path in {a.projection(p).module for a in spec.layers for p in ("key", "value")}
    ]
    offsets = FarOffsets(model, window, recent)
    with oracle_attention(model, offsets), torch.enable_grad():
        logits = model(window, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum")
    leaves = [offsets.keys, offsets.values]
    flat = torch.autograd.grad(loss, [leaf[a.layer] for leaf in leaves for a in spec.layers])
    for handle in handles:
        handle.remove()
    found = {}
    for i, part in enumerate(("key", "value")):
        for a in spec.layers:
            projection = a.projection(part)
            x = outputs[projection.module].detach().flatten(2)[0, :, projection.start : projection.stop]
            g = flat[i * len(spec.layers) + a.layer].transpose(1, 2).flatten(2)[0]
            found[Site(a.layer, part)] = (x, g)
    return found


@pytest.fixture
def sampled_labels(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Everything that is drawn during the test."""
    sampled: list[Tensor] = []
    original = fisher.drawn

    def record(*args: Any, **kwargs: Any) -> Tensor:
        sampled.append(original(*args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(fisher, "drawn", record)
    return sampled


@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_equal_a_dense_backward_pass(
    tiny_checkpoint: Any, tiny_model: Any, sampled_labels: list[Tensor], family: str, recent: int
) -> None:
    windows = random_ids(2, 24, seed=3)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        spec = checkpoint.spec
    moments = empty_moments(spec, {}, group=spec.layers[0].n_kv_heads)
    collect_moments(tiny_model(family), spec, windows, moments, sinks=SINKS, recent=recent, seed=0)
    labels = torch.cat(sampled_labels).reshape(2, 24)
    model = tiny_model(family, dtype=torch.float64).requires_grad_(False)
    expected: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in spec.sites}
    for window, row in zip(windows, labels, strict=True):
        for site, pair in dense_moments(model, spec, window[None], row, recent).items():
            expected[site].append(pair)
    for site, pairs in expected.items():
        x = torch.cat([x[SINKS:] for x, _ in pairs])
        g = torch.cat([g[SINKS:] for _, g in pairs])
        ours = moments.sites[site]
        whole = torch.arange(spec.width(site))[None]
        assert ours.n_tokens == len(x) == 2 * (24 - SINKS)
        assert_near(ours.mean, x.mean(0))
        assert_near(ours.covariance(whole, centred=False)[0], x.T @ x / len(x))
        np.testing.assert_allclose(
            ours.covariance(whole, centred=True)[0].numpy(),
            np.cov(x.numpy().T, bias=True),
            atol=1e-4 * float(x.square().mean()),
        )
        assert_near(ours.fisher_information(whole)[0], g.T @ g / len(g))
        assert g.abs().max() > 0


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """float32 calibration against float64: a ten-thousandth of the largest entry."""
    assert (ours - expected).abs().max() < 2e-4 * expected.abs().max()


def test_labels_follow_the_model(tiny_checkpoint: Any, tiny_model: Any, sampled_labels: list[Tensor]) -> None:
    """Labels are drawn from the softmax of the logits: their mean negative log-likelihood is the entropy."""
    windows = random_ids(16, 48, seed=5)
    model = tiny_model("llama-gqa")
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        collect_moments(model, checkpoint.spec, windows, moments, sinks=0, recent=0, seed=2)
    with torch.no_grad():
        logs = model(windows).logits.log_softmax(-1).flatten(0, 1)
    surprise = -logs.gather(1, torch.cat(sampled_labels)).squeeze(1)
    entropy = -(logs.exp() * logs).sum(1)
    deviation = ((logs.exp() * logs.square()).sum(1) - entropy.square()).sum().sqrt() / len(logs)
    assert (surprise.mean() - entropy.mean()).abs() < 3 * deviation


def test_labels_are_drawn_slice_by_slice(
    tiny_checkpoint: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same labels, slices of logit rows change nothing."""
    monkeypatch.setattr(fisher, "drawn", lambda p, generator: p.argmax(-1, keepdim=True))
    found = []
    for rows in (1000, 7):
        monkeypatch.setattr("kvcompress.calibration.fisher._LOGIT_ROWS", rows)
        with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
            moments, ids = (
                empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads),
                random_ids(1, 40),
            )
            collect_moments(tiny_model("llama-gqa"), checkpoint.spec, ids, moments, sinks=0, recent=0, seed=0)
        found.append(moments)
    for site in found[0].sites:
        assert_near(found[1].sites[site].fisher[0], found[0].sites[site].fisher[0])


def fixed_labels(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Stands in for drawing.drawn: labels that do not depend on the probabilities."""
    return (torch.arange(len(probability)) * 7 % probability.shape[1])[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_survive(tiny_checkpoint: Any, tiny_model: Any, dtype: torch.dtype) -> None:
    """16-bit models give the same moments to one digit, with the same labels."""
    smooth = {"initializer_range": 0.1}  # gradients of a trained model's size
    found = []
    for run_dtype in (torch.float32, dtype):
        checkpoint_of = open_checkpoint(tiny_checkpoint("llama-bf16", **smooth))
        with checkpoint_of as checkpoint, pytest.MonkeyPatch.context() as patch:
            patch.setattr(fisher, "drawn", fixed_labels)
            moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
            model = tiny_model("llama-bf16", dtype=run_dtype, **smooth)
            collect_moments(model, checkpoint.spec, random_ids(8, 40), moments, sinks=2, recent=0, seed=0)
        found.append(moments)
    for site in found[0].sites:
        wide, narrow = (m.sites[site].fisher[0][0] for m in found)
        assert (wide - narrow).norm() < 0.1 * wide.norm()
        assert narrow.trace() / wide.trace() == pytest.approx(1, abs=0.02)


def test_the_same_seed_gives_the_same_moments(tiny_checkpoint: Any, tiny_model: Any) -> None:
    found = []
    for seed in (0, 0, 1):
        with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
            moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
            found.append(
                collect_moments(
                    tiny_model("llama-gqa"), checkpoint.spec, random_ids(2, 24), moments, sinks=0, recent=0, seed=seed
                )
            )
    first, again, other = (m.sites[Site(1, "key")].fisher[0] for m in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_calibration_gives_the_model_back(tiny_checkpoint: Any, tiny_model: Any) -> None:
    model = tiny_model("llama-gqa")
    before = model.config._attn_implementation
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        collect_moments(model, checkpoint.spec, random_ids(1, 16), moments, sinks=0, recent=0, seed=0)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_activations_that_are_not_finite(tiny_checkpoint: Any, tiny_model: Any) -> None:
    model = tiny_model("llama-gqa")
    model.get_submodule("model.layers.1.self_attn.v_proj").weight.data[3, 4] = float("nan")
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        with pytest.raises((CalibrationError, RuntimeError)) as error:
            collect_moments(model, checkpoint.spec, random_ids(1, 16), moments, sinks=0, recent=0, seed=0)
    assert error.type is CalibrationError
    assert "NaN" in str(error.value)


def wide_attention(n_kv_heads: int = 8, head_dim: int = 16) -> AttentionSpec:
    projection = Projection("w", None, "m", 0, n_kv_heads * head_dim)
    return AttentionSpec(0, n_kv_heads, n_kv_heads, head_dim, head_dim, projection, projection)


@pytest.mark.parametrize(("group", "band"), [(1, 2), (2, 4), (4, 8)])
def test_partitions_of_a_wide_model_agree_with_the_whole(group: int, band: int) -> None:
    """Head groups and bands alone give every basis that fits the width the moments it would get from everything."""
    spec = wide_attention()
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(50, spec.width, dtype=torch.float64, generator=generator) for _ in range(2))
    parts = usable_partitions(spec, group, band)
    assert [p.shape[1] for p in parts] == [group * spec.head_dim, band * spec.n_kv_heads]
    few, whole = (SiteMoments.empty(p, spec.width) for p in (parts, usable_partitions(spec, spec.n_kv_heads, band)))
    for moments in (few, whole):
        moments.add(x[:20], g[:20])
        moments.add(x[20:], g[20:])
    bases = [BASES[n]() for n in ("head", "share", "frequency", "per_head")]
    for basis in [*bases, BASES["latent"](group), BASES["band"](band)]:
        blocks = basis.blocks(spec)
        for centred in (False, True):
            ours, expected = (m.covariance(blocks, centred=centred) for m in (few, whole))
            torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(few.fisher_information(blocks), whole.fisher_information(blocks))
    with pytest.raises(CalibrationError, match="do not hold the blocks"):
        few.covariance(BASES["latent"]().blocks(spec), centred=True)


def test_moments_of_blocks_against_numpy() -> None:
    """Any order of a block's numbers, and both ways to centre."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(30, 12, dtype=torch.float64, generator=generator) + 2 for _ in range(2))
    moments = SiteMoments.empty([torch.arange(12)[None]], 12)
    moments.add(x, g)
    blocks = torch.tensor([[3, 0, 7], [11, 1, 2]])
    for b, block in enumerate(blocks):
        rows = x[:, block].numpy()
        np.testing.assert_allclose(moments.covariance(blocks, centred=True)[b], np.cov(rows.T, bias=True))
        np.testing.assert_allclose(moments.covariance(blocks, centred=False)[b], rows.T @ rows / 30)
        gradients = g[:, block].numpy()
        np.testing.assert_allclose(moments.fisher_information(blocks)[b], gradients.T @ gradients / 30)


def test_moments_hold_float64_sums(tiny_moments: Any) -> None:
    moments: Moments = tiny_moments("llama-gqa")
    for sums in moments.sites.values():
        assert {t.dtype for t in (sums.total, *sums.outer, *sums.fisher)} == {torch.float64}
