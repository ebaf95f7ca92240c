"""An attached model compresses, whoever calls it, or says that it does not: never a quiet no-op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvcompress
from kvcompress.compat import CACHE_NAMES, NEWEST, OLDEST, ForwardArguments, cache_of
from kvcompress.errors import AttachmentError, OptionError
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.cache import CompressedCache
from tests.tiny_models import PAD, build_tokenizer, random_ids

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture
def plan_of(tiny_plan: Any) -> Any:
    return lambda family="llama-gqa": tiny_plan(family, keep=0.1, recent=0, sinks=1)


@pytest.fixture
def attached(tiny_model: Any, plan_of: Any) -> Any:
    return lambda family="llama-gqa": attach_plan(tiny_model(family), *plan_of(family))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[CompressedCache]:
    """Every compressed cache that anything was encoded into, in order."""
    caches: list[CompressedCache] = []
    update = CompressedCache.update

    def watched(cache: CompressedCache, *args: Any, **kwargs: Any) -> Any:
        if cache not in caches:
            caches.append(cache)
        return update(cache, *args, **kwargs)

    monkeypatch.setattr(CompressedCache, "update", watched)
    return caches


def is_compressed(cache: CompressedCache, n_tokens: int) -> bool:
    return cache.get_seq_length() == n_tokens and all(layer.n_encoded >= n_tokens // 32 * 32 for layer in cache.layers)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a release that calls the cache something else: what we give under the old name is not heard."""

    def with_cache(self: ForwardArguments, args: Any, kwargs: dict[str, Any], cache: Any) -> Any:
        heard = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        return args, heard | {"key_value_store": cache}

    monkeypatch.setattr(ForwardArguments, "with_cache", with_cache)


@pytest.mark.usefixtures("renamed")
class TestARenamedArgumentIsSeen:
    def says_so(self, call: Callable[[], Any]) -> None:
        with pytest.raises(AttachmentError, match="nothing would be compressed") as error, torch.no_grad():
            call()
        text = str(error.value)
        assert f"transformers {transformers.__version__} with torch {torch.__version__}" in text
        assert f"transformers>={OLDEST},<" in text and NEWEST in text and "issue" in text and "\n" not in text

    def test_in_a_forward(self, attached: Any) -> None:
        model, ids = attached(), random_ids(1, 40)
        self.says_so(lambda: model(ids))
        self.says_so(lambda: model.get_decoder()(ids))
        self.says_so(lambda: model(ids, past_key_values=attachment_of(model).new_cache()))

    def test_in_a_simulation(self, attached: Any, text_file: Path) -> None:
        model = attached()
        with attachment_of(model).simulated(sinks=1, recent=0):
            self.says_so(lambda: model(random_ids(1, 40), use_cache=False))
        self.says_so(lambda: evaluate(model, build_tokenizer(), str(text_file), seq_len=64, max_windows=1))

    def test_after_load(self, tiny_checkpoint: Any, tmp_path: Path) -> None:
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", CompressOptions(metric="weights", recent=4))
        model = kvcompress.load(tmp_path / "out")
        self.says_so(lambda: model.generate(random_ids(1, 40), **GREEDY))
        self.says_so(lambda: kvcompress.GraphDecoder(model, capacity=60).prefill(random_ids(1, 40)))

    def test_exact_runs_go_on(self, attached: Any) -> None:
        assert attached()(random_ids(1, 9), use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_was_exchanged_is_seen(attached: Any, implementation: str) -> None:
    model = attached()
    model.set_attn_implementation(implementation)
    with pytest.raises(AttachmentError, match=r"of the 3 layers of LlamaModel that .* is attached to, 0 attended"):
        model.generate(random_ids(1, 40), **GREEDY)
    with pytest.raises(AttachmentError, match="0 attended"), attachment_of(model).simulated(sinks=1, recent=0):
        model(random_ids(1, 40), use_cache=False)


def test_folded_attention_that_was_exchanged_is_seen(folded_output: Any) -> None:
    """With one virtual head sdpa would run, and say something else."""
    model = kvcompress.load(folded_output("llama-gqa", {"key_basis": "head", "value_basis": "head"}))
    model.generate(random_ids(1, 9), **GREEDY)
    model.set_attn_implementation("sdpa")
    with pytest.raises(AttachmentError, match="0 attended"):
        model.generate(random_ids(1, 9), **GREEDY)


def expected_tokens(model: Any, ids: Tensor) -> Tensor:
    """Return what the attached model generates, having checked that it is not what the original does."""
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    with kvcompress.uncompressed():
        exact = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
    assert not torch.equal(tokens, exact)
    return tokens


def test_a_pipeline(attached: Any, seen: list[CompressedCache]) -> None:
    model, tokenizer = attached(), build_tokenizer()
    prompt = "the river was stone and the paper carried light to the garden " * 3
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(expected_tokens(model, ids)[0], skip_special_tokens=True)
    seen.clear()
    run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert run(prompt, **GREEDY)[0]["generated_text"] == expected
    assert len(seen) == 1 and is_compressed(seen[0], ids.shape[1] + 23)


@pytest.mark.parametrize("first", ["attach", "adapter"])
def test_an_adapter_of_peft(tiny_model: Any, plan_of: Any, seen: list[CompressedCache], first: str) -> None:
    """PEFT calls forward past a model's hooks; its adapters change what is cached, and say so in the tokens."""
    peft = pytest.importorskip("peft")
    # small, as training makes them: with a large random one the model is no relative of the one that was compressed
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    if first == "attach":
        model = peft.get_peft_model(attach_plan(tiny_model("llama-gqa"), *plan_of()), config).eval()
    else:
        model = attach_plan(peft.get_peft_model(tiny_model("llama-gqa"), config).eval(), *plan_of())
    ids = random_ids(1, 40)
    tokens = expected_tokens(model, ids)
    assert is_compressed(seen[-1], 63)
    with torch.no_grad():
        output = model(input_ids=ids)
    assert isinstance(cache_of(output), CompressedCache) and is_compressed(cache_of(output), 40)
    assert attachment_of(model).model is model.get_base_model()
    kvcompress.detach(model)
    assert not torch.equal(tokens, model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))


@pytest.mark.parametrize("order", ["attach first", "compile first"])
def test_torch_compile(tiny_model: Any, plan_of: Any, order: str) -> None:
    torch._dynamo.reset()
    ids, plan = random_ids(2, 70), plan_of()
    with torch.no_grad():
        expected = attach_plan(tiny_model("llama-gqa"), *plan)(ids).logits
        model = tiny_model("llama-gqa")
        if order == "attach first":
            compiled = torch.compile(attach_plan(model, *plan), backend="eager")
        else:
            compiled = attach_plan(torch.compile(model, backend="eager"), *plan)
        outputs = [compiled(ids), compiled(ids)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    for output in outputs:
        assert is_compressed(cache_of(output), 70)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), attachment_of(compiled).simulated(sinks=1, recent=0):
        simulated = compiled(ids, use_cache=False).logits
    assert (simulated - expected).abs().max() > 0.1


def test_a_device_map_with_layers_on_disk(
    tiny_checkpoint: Any, plan_of: Any, tiny_model: Any, tmp_path: Path, seen: list[CompressedCache]
) -> None:
    """accelerate wraps every module, and the weights of one layer are only there while it runs."""
    placed = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    placed |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("llama-gqa"), device_map=placed, offload_folder=str(tmp_path), dtype=torch.float32
    )
    assert any(p.is_meta for p in model.parameters())
    ids, plan = random_ids(1, 40), plan_of()
    expected = attach_plan(tiny_model("llama-gqa"), *plan).generate(ids, **GREEDY)
    seen.clear()
    attach_plan(model, *plan)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert is_compressed(seen[-1], 63)
    kvcompress.detach(model)
    original = tiny_model("llama-gqa").generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), original)


def test_a_copy_is_a_model_of_its_own(attached: Any, seen: list[CompressedCache]) -> None:
    model, ids = attached(), random_ids(1, 40)
    expected = expected_tokens(model, ids)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    kvcompress.detach(model)
    assert torch.equal(twin.generate(ids, **GREEDY), expected)
    assert attachment_of(twin).model is twin


class TestWhatCannotBeCompressed:
    def test_another_cache_of_transformers(self, attached: Any) -> None:
        model, ids = attached(), random_ids(1, 9)
        for name in ("static", "offloaded", "paged"):
            with pytest.raises(OptionError, match=f'cache_implementation="{name}".*GraphDecoder.*detach'):
                model.generate(ids, cache_implementation=name, **GREEDY)
        model.generation_config.cache_implementation = "static"
        with pytest.raises(OptionError, match='cache_implementation="static"'):
            model.generate(ids, **GREEDY)
        model.generation_config.cache_implementation = None
        model.generate(ids, cache_implementation="dynamic", **GREEDY)

    def test_continuous_batching(self, attached: Any) -> None:
        model = attached()
        assert hasattr(model, "generate_batch")
        with pytest.raises(OptionError, match=r"generate_batch runs transformers' own paged cache.*detach"):
            model.generate_batch([[5, 6, 7]])
        kvcompress.detach(model)
        assert "generate_batch" not in vars(model)
