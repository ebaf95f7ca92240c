"""The folded form: smaller k_proj and v_proj whose ordinary cache holds virtual heads.

The reference is the original model with every projection W replaced by D E W, the full-size matrix that encodes and
decodes: stock transformers, no code of the run time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress
from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, load_maps, save_maps
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.writer import copy_checkpoint
from kvcompress.errors import BudgetError, OptionError, UnsupportedModelError
from kvcompress.fold.folding import write_folded_weights
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attachment_of
from tests.coding import coded_plan
from tests.tiny_models import PAD, random_ids

FOLDABLE = ["llama-mha", "llama-gqa", "llama-bias", "llama-tied", "llama-sharded", "qwen2", "smollm3"]


def projector(maps: SiteMaps) -> Tensor:
    """Return D E, [n, n] float64."""
    n = maps.blocks.numel()
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for encoder, decoder, block in zip(maps.encoder.double(), maps.decoder.double(), maps.block.tolist(), strict=True):
        places = maps.blocks[block]
        matrix[places[:, None], places[None, :]] += decoder[:, None] * encoder[None, :]
    return matrix


def projected(model: Any, directory: Path) -> Any:
    """Return the original model with keys and values replaced by decode(encode(.)), by changing its weights."""
    with open_checkpoint(directory.parent / "original") as checkpoint:
        spec = checkpoint.spec
    for site, maps in load_maps(directory).items():
        module = model.get_submodule(spec.attention(site).projection(site.part).module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(projector(maps) @ parameter.double())
    return model


@pytest.fixture
def folded(tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> Any:
    """folded(family, **options): the directory of a folded compression, its original beside it."""

    def make(family: str, **options: Any) -> Path:
        (tmp_path / "original").symlink_to(tiny_checkpoint(family))
        options = {
            "key_basis": "frequency",
            "value_basis": "latent",
            "policy": "uniform",
            "calibration": (str(text_file),),
            "tokens": 512,
            "seq_len": 64,
            "folded": True,
        } | options
        compress(tmp_path / "original", tmp_path / "out", CompressOptions(**({"keep": 0.5} | options)), device="cpu")
        return tmp_path / "out"

    return make


def cache_bytes(cache: Any) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("family", FOLDABLE)
def test_folded_is_the_projected_model(folded: Any, tiny_model: Any, family: str) -> None:
    directory = folded(family)
    model, reference = kvcompress.load(directory), projected(tiny_model(family), directory)
    ids = random_ids(2, 30)
    logits = model(ids).logits
    torch.testing.assert_close(logits, reference(ids).logits, rtol=2e-4, atol=2e-4)
    assert (logits - tiny_model(family)(ids).logits).abs().max() > 0.1
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.parametrize(("key_basis", "value_basis"), [("head", "head"), ("share", "head"), ("head", "latent")])
def test_other_bases(folded: Any, tiny_model: Any, key_basis: str, value_basis: str) -> None:
    directory = folded("llama-mha", key_basis=key_basis, value_basis=value_basis)
    ids = random_ids(1, 30)
    ours = kvcompress.load(directory)(ids).logits
    reference = projected(tiny_model("llama-mha"), directory)(ids).logits
    torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "smollm3"])
def test_the_ordinary_cache_shrinks_as_claimed(folded: Any, tiny_model: Any, family: str) -> None:
    directory = folded(family)
    plan = Plan.load(directory)
    ids = random_ids(1, 40)
    output = kvcompress.load(directory)(ids)
    assert type(output.past_key_values).__name__ == "DynamicCache"
    whole = cache_bytes(tiny_model(family)(ids).past_key_values)
    assert cache_bytes(output.past_key_values) == plan.cache_bytes(40) == whole // 2
    assert plan.keep == 0.5


def test_loss_policy_gives_layers_different_heads(folded: Any, tiny_model: Any) -> None:
    directory = folded("llama-mha", policy="loss", keep=0.6)
    ranks = {s.rank for s in Plan.load(directory).sites}
    assert len(ranks) > 1
    ids = random_ids(1, 30)
    ours = kvcompress.load(directory)(ids).logits
    torch.testing.assert_close(ours, projected(tiny_model("llama-mha"), directory)(ids).logits, rtol=2e-4, atol=2e-4)


def test_a_site_without_heads(folded: Any, tiny_model: Any) -> None:
    """With one KV head a layer, half of the budget leaves sites with no virtual head: refused, or a model that runs."""
    try:
        directory = folded("llama-mqa", policy="loss", keep=0.5)
    except BudgetError:
        return
    ids = random_ids(1, 30)
    ours = kvcompress.load(directory)(ids).logits
    torch.testing.assert_close(ours, projected(tiny_model("llama-mqa"), directory)(ids).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "smollm3"])
@pytest.mark.usefixtures("never_exact")
def test_full_rank_is_the_original(
    tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, tmp_path: Path, family: str
) -> None:
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        plan, maps = coded_plan(
            checkpoint,
            tiny_moments(family),
            key_basis="frequency",
            folded=True,
            basis_arguments={"key": {"whole_heads": True}, "value": {"unit": 8}},
        )
        copy_checkpoint(checkpoint.path, tmp_path, weights=frozenset())
        write_folded_weights(checkpoint, maps, tmp_path)
    save_maps(maps, tmp_path / MAPS_FILE)
    plan.save(tmp_path)
    ids = random_ids(2, 30)
    torch.testing.assert_close(
        kvcompress.load(tmp_path)(ids).logits, tiny_model(family)(ids).logits, rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float32, torch.bfloat16])
def test_any_dtype(folded: Any, dtype: Any) -> None:
    model = kvcompress.load(folded("llama-gqa"), dtype=dtype)
    wanted = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model(random_ids(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(("family", "reason"), [("qwen3", "key norm"), ("phi3", "fused")])
def test_families_that_cannot_fold(folded: Any, tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        folded(family)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_basis": "latent"}, "does not commute"),
        ({"key_basis": "band"}, "does not commute"),
        ({"key_basis": "frequency", "value_basis": "per_head"}, "whole virtual heads"),
        ({"key_basis": "frequency", "maps_only": True}, "maps-only"),
    ],
)
def test_options_that_cannot_fold(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        CompressOptions(folded=True, **options)


def test_the_index_of_a_sharded_checkpoint_is_mended(folded: Any) -> None:
    directory = folded("llama-sharded")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with open_checkpoint(directory.parent / "original") as original:
        saved = original.weight_bytes - index["metadata"]["total_size"]
    # Half of the rows of k_proj and v_proj: 3 layers of 2 * 8 rows of 32 float32.
    assert saved == 3 * 2 * 8 * 32 * 4


def test_detach_does_not_leave_an_attention_of_ours(folded: Any) -> None:
    model = kvcompress.load(folded("llama-gqa"))
    assert attachment_of(model).plan.form == "folded"
    kvcompress.detach(model)
    assert not any(hasattr(m, "kvcompress") for m in model.modules())
