"""Attaching and detaching, loading, and what the attached model refuses."""

from __future__ import annotations

import gc
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import kvcompress
from kvcompress.compat import cache_argument
from kvcompress.errors import CheckpointError, OptionError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.cache import CompressedCache
from tests.tiny_models import PAD, random_ids


@pytest.fixture
def plan_of(tiny_plan: Any) -> Any:
    return lambda family, **options: tiny_plan(family, **({"recent": 4} | options))


@pytest.fixture(scope="module")
def coded_directory(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-free coded checkpoint of llama-gqa."""
    output = tmp_path_factory.mktemp("coded") / "out"
    options = CompressOptions(metric="weights", sinks=2, recent=4)
    compress(tiny_checkpoint("llama-gqa"), output, options)
    return output


def snapshot(model: Any) -> dict[str, Any]:
    """Return everything that attaching could leave on a model."""
    return {
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "generate": model.generate.__func__,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


@pytest.mark.parametrize("family", ["llama-gqa", "phi3", "smollm3"])
def test_detach_restores_the_model_exactly(tiny_model: Any, plan_of: Any, family: str) -> None:
    model = tiny_model(family)
    ids = random_ids(1, 20)
    before, logits = snapshot(model), model(ids).logits
    attach_plan(model, *plan_of(family))
    assert isinstance(model(ids).past_key_values, CompressedCache)
    kvcompress.detach(model)
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k != "weights"} == {k: v for k, v in before.items() if k != "weights"}
    assert all(torch.equal(after["weights"][name], tensor) for name, tensor in before["weights"].items())
    assert torch.equal(model(ids).logits, logits)
    assert isinstance(model(ids).past_key_values, DynamicCache)


def test_detach_of_a_plain_model_does_nothing(tiny_model: Any) -> None:
    model = tiny_model("llama-gqa")
    kvcompress.detach(model)
    with pytest.raises(OptionError, match="no compressed cache"):
        attachment_of(model)


def test_attaching_twice_replaces_the_first(tiny_model: Any, plan_of: Any) -> None:
    model = tiny_model("llama-gqa")
    before = snapshot(model)
    attach_plan(model, *plan_of("llama-gqa", keep=0.25))
    once = snapshot(model)["hooks"]
    plan, maps = plan_of("llama-gqa", keep=0.75)
    attach_plan(model, plan, maps)
    assert snapshot(model)["hooks"] == once
    cache = model(random_ids(1, 40)).past_key_values
    assert cache.nbytes() == plan.cache_bytes(40, exact_number_bytes=4)
    kvcompress.detach(model)
    assert snapshot(model)["hooks"] == before["hooks"]


@pytest.mark.parametrize("family", ["llama-mha", "mistral", "qwen2"])
def test_another_model_is_refused(tiny_model: Any, coded_directory: Path, family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model)["attributes"]
    with pytest.raises(CheckpointError, match="made for a llama model with 3 layers"):
        kvcompress.attach(model, coded_directory)
    assert snapshot(model)["attributes"] == before


def test_use_cache_false_stays_exact(tiny_model: Any, plan_of: Any) -> None:
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": False, "pad_token_id": PAD}
    ids = random_ids(2, 20)
    model = tiny_model("llama-gqa")
    exact = model.generate(ids, **options)
    attach_plan(model, *plan_of("llama-gqa", keep=0.1, recent=0))
    assert torch.equal(model.generate(ids, **options), exact)
    assert model(ids, use_cache=False).past_key_values is None


def test_compression_changes_what_is_generated(tiny_model: Any, plan_of: Any) -> None:
    """The cache really is used: at a tenth of the bytes a random model cannot say the same."""
    ids, model = random_ids(2, 40), tiny_model("llama-gqa")
    exact = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=PAD)
    attach_plan(model, *plan_of("llama-gqa", keep=0.1, recent=0, sinks=0))
    coded = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=PAD)
    assert not torch.equal(coded, exact)


def test_a_given_dynamic_cache_is_refused_unless_asked_for(tiny_model: Any, plan_of: Any) -> None:
    model = attach_plan(tiny_model("llama-gqa"), *plan_of("llama-gqa", keep=0.1))
    ids = random_ids(1, 30)
    for call in (model, model.get_decoder(), partial(model.generate, max_new_tokens=2, pad_token_id=PAD)):
        with pytest.raises(OptionError, match=r"given a DynamicCache, which compresses nothing.*new_cache\(\)"):
            call(ids, **cache_argument(model, DynamicCache()))
    with kvcompress.uncompressed():
        logits = model(ids, **cache_argument(model, DynamicCache())).logits
    kvcompress.detach(model)
    assert torch.equal(logits, model(ids).logits)


def test_arguments_may_be_positional(tiny_model: Any, plan_of: Any) -> None:
    """The cache of a forward and the configuration of a generation, given without their names."""
    model = attach_plan(tiny_model("llama-gqa"), *plan_of("llama-gqa", keep=0.1, recent=0))
    ids, cache = random_ids(1, 30), DynamicCache()
    with kvcompress.uncompressed():
        model(ids, None, None, cache)
    assert cache.get_seq_length() == 30
    exact = GenerationConfig(use_cache=False, max_new_tokens=10, do_sample=False, pad_token_id=PAD)
    ours = model.generate(ids, exact)
    kvcompress.detach(model)
    assert torch.equal(ours, model.generate(ids, exact))


def test_a_cache_is_freed_with_its_last_name(tiny_model: Any, plan_of: Any) -> None:
    """The model does not keep the cache of the last call alive."""
    model = attach_plan(tiny_model("llama-gqa"), *plan_of("llama-gqa"))
    output = model(random_ids(1, 40))
    layer = weakref.ref(output.past_key_values.layers[1])
    del output
    gc.collect()
    assert layer() is None


def test_training_is_left_alone(tiny_model: Any, plan_of: Any) -> None:
    """In training mode nothing is compressed, and gradients flow."""
    model = attach_plan(tiny_model("llama-gqa"), *plan_of("llama-gqa", keep=0.1))
    model.train()
    output = model(random_ids(1, 30), labels=random_ids(1, 30))
    assert not isinstance(output.past_key_values, CompressedCache)
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_load_and_attach_agree(tiny_model: Any, coded_directory: Path) -> None:
    ids = random_ids(1, 30)
    loaded = kvcompress.load(coded_directory)
    attached = kvcompress.attach(tiny_model("llama-gqa"), coded_directory)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(loaded.generate(ids, **options), attached.generate(ids, **options))
    assert not loaded.training


def test_the_output_loads_in_plain_transformers(tiny_model: Any, coded_directory: Path) -> None:
    ids = random_ids(1, 30)
    plain = AutoModelForCausalLM.from_pretrained(coded_directory, dtype=torch.float32)
    assert torch.equal(plain(ids).logits, tiny_model("llama-gqa")(ids).logits)


def test_a_folded_checkpoint_cannot_be_attached(tiny_model: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    options = CompressOptions(metric="weights", key_basis="frequency", policy="uniform", keep=0.5, folded=True)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options)
    with pytest.raises(OptionError, match=r"kvcompress\.load"):
        kvcompress.attach(tiny_model("llama-gqa"), tmp_path / "out")


class TestMapsOnly:
    @pytest.fixture
    def maps_only(self, tiny_checkpoint: Any, tmp_path: Path) -> tuple[Path, Path]:
        """(original, output) of a maps-only compression, in directories of this test's own."""
        original = tmp_path / "original"
        shutil.copytree(tiny_checkpoint("llama-gqa"), original)
        compress(original, tmp_path / "maps", CompressOptions(metric="weights", maps_only=True, recent=4))
        return original, tmp_path / "maps"

    def test_holds_no_weights(self, maps_only: tuple[Path, Path]) -> None:
        names = {f.name for f in maps_only[1].iterdir()}
        assert names == {"kv_maps.safetensors", "kv_plan.json", "report.json", "README.md"}

    def test_loads_from_the_recorded_source(self, maps_only: tuple[Path, Path]) -> None:
        assert isinstance(kvcompress.load(maps_only[1])(random_ids(1, 9)).past_key_values, CompressedCache)

    def test_names_the_source_that_has_gone(self, maps_only: tuple[Path, Path]) -> None:
        original, output = maps_only
        original.rename(original.with_name("moved"))
        with pytest.raises(CheckpointError, match="holds only maps") as error:
            kvcompress.load(output)
        assert "\n" not in str(error.value)
        moved = kvcompress.load(output, base=original.with_name("moved"))
        assert isinstance(moved(random_ids(1, 9)).past_key_values, CompressedCache)
