"""Exported models in stock transformers and as GGUF, against the folded model that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kvcompress
from kvcompress.checkpoint.reader import open_folded
from kvcompress.errors import OptionError, OutputError, UnsupportedModelError
from kvcompress.export.export import export
from kvcompress.export.layout import stock_layers
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.output import read_output
from tests.export_cases import EXACT, FREQUENCY, GROUPED, LLAMAS, WIDE
from tests.tiny_models import random_ids


def assert_same(directory: Path, exported: Path, **expected: int) -> None:
    """The exported model in stock transformers is the folded one, and its cache is as large as claimed."""
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = random_ids(2, 40)
    with torch.no_grad():
        output = model(ids, use_cache=True)
        reference = kvcompress.load(directory, dtype=torch.float32)(ids, use_cache=True)
    torch.testing.assert_close(output.logits, reference.logits, **EXACT)
    sizes = [
        sum(t.untyped_storage().nbytes() for layer in run.past_key_values.layers for t in (layer.keys, layer.values))
        for run in (output, reference)
    ]
    assert sizes[0] == sizes[1]
    for name, value in expected.items():
        assert getattr(model.config, name) == value


@pytest.mark.parametrize("family", [*LLAMAS, "llama-gqa", "llama-tied", "llama-sharded", "mistral", "mistral-sliding"])
def test_groups_of_heads_keep_head_dim(folded_output: Any, tmp_path: Path, family: str) -> None:
    directory = folded_output(family, GROUPED)
    result = export(directory, tmp_path / "out", dtype="float32")
    n_kv_heads = 2 if family == "llama-mha" else 1
    assert_same(directory, tmp_path / "out", num_key_value_heads=n_kv_heads, head_dim=8)
    assert (result.n_virtual, result.extra_weight_bytes <= 0, result.pays_from_tokens) == (1, True, 0)


@pytest.mark.parametrize("family", LLAMAS)
def test_virtual_heads_become_one_wide_head(folded_output: Any, tmp_path: Path, family: str) -> None:
    directory = folded_output(family, FREQUENCY, **WIDE)
    result = export(directory, tmp_path / "out", dtype="float32")
    assert_same(directory, tmp_path / "out", num_key_value_heads=1, head_dim=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1.0
    assert config["rope_scaling"]["short_factor"] == config["rope_scaling"]["long_factor"]
    # q_proj and o_proj doubled, less half of k_proj and v_proj: 3 layers of matrices of 32 columns
    grown = 3 * 32 * (2 * 8 * 32 - 2 * 4 * 16) * 4
    biases = {"llama-bias": 3 * (256 - 2 * 64) * 4, "qwen2": 3 * (256 - 2 * 64) * 4}
    assert result.extra_weight_bytes == grown + biases.get(family, 0)
    written = sum(t.numel() * 4 for n, t in load_file(tmp_path / "out" / "model.safetensors").items())
    added_zeros = 3 * 32 * 4 if family == "qwen2" else 0
    assert written == result.weight_bytes + added_zeros
    saved = result.plan.original_bytes_per_token - result.cache_bytes_per_token
    assert (result.pays_from_tokens - 1) * saved < result.extra_weight_bytes <= result.pays_from_tokens * saved


def test_groups_may_keep_several_virtual_heads(folded_output: Any, tmp_path: Path) -> None:
    directory = folded_output("llama-mha", GROUPED | {"per_group": 2}, **(WIDE | {"num_key_value_heads": 8}))
    export(directory, tmp_path / "out", dtype="float32")
    assert_same(directory, tmp_path / "out", num_key_value_heads=2, head_dim=64)


@pytest.mark.parametrize("options", [{"key_basis": "head", "value_basis": "head"}, {"key_basis": "share"}])
def test_other_bases_fold_as_well(folded_output: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    directory = folded_output("llama-mha", options, **WIDE)
    export(directory, tmp_path / "out", dtype="float32")
    assert_same(directory, tmp_path / "out", num_key_value_heads=1, head_dim=64)


@pytest.mark.parametrize("family", ["phi3", "phi3-partial"])
def test_fused_projections_are_written_as_a_llama_that_folds(
    tiny_checkpoint: Any, tiny_model: Any, text_file: Path, tmp_path: Path, family: str
) -> None:
    """Partial rotary becomes frequencies of zero; the llama is the model itself, and so are its folds' exports."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": None}
    sizes["initializer_range"] = 0.1  # wider models than the others: smaller numbers
    llama = tmp_path / "llama"
    result = export(tiny_checkpoint(family, **sizes), llama, dtype="float32")
    assert result.to_json()["keep"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_model(family, **sizes)(ids).logits, **EXACT)
    assert (model.config.rope_parameters["rope_type"] == "longrope") == (family == "phi3-partial")
    small = {"calibration": (str(text_file),), "tokens": 512, "seq_len": 64, "recent": 0, "keep": 0.5}
    for basis, n_kv_heads in (("grouped", 2), ("frequency", 1)):
        options = CompressOptions(folded=True, key_basis=basis, policy="uniform", **small)
        compress(llama, tmp_path / basis, options, device="cpu")
        export(tmp_path / basis, tmp_path / f"{basis}-out", dtype="float32")
        assert_same(tmp_path / basis, tmp_path / f"{basis}-out", num_key_value_heads=n_kv_heads)


def test_a_model_that_keeps_everything(folded_output: Any, tmp_path: Path) -> None:
    """No site has maps: the export is the original in llama's words."""
    directory = folded_output("qwen2", GROUPED | {"keep": 1.0})
    export(directory, tmp_path / "out", dtype="float32")
    assert_same(directory, tmp_path / "out", num_key_value_heads=2)


def test_layers_with_different_groups(folded_output: Any, tmp_path: Path) -> None:
    """DeciLM and GGUF take them, llama does not; what is written differs in nothing but the config."""
    directory = folded_output("llama-mha", GROUPED | {"policy": "middle", "layers": "1:3", "keep": 0.67}, **WIDE)
    with pytest.raises(UnsupportedModelError, match="4 heads; a llama checkpoint has as many in every layer"):
        export(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = export(directory, tmp_path / "out", to="vllm-decilm", dtype="float32")
    assert result.n_kv_heads == (4, 2, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [b["attention"]["n_heads_in_group"] for b in config["block_configs"]] == [2, 4, 4]
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.block_configs[1].attention.n_heads_in_group == 4 and loaded.head_dim == 32
    assert loaded.rope_parameters["rope_theta"] == 10000.0
    again = type(loaded)(**json.loads(loaded.to_json_string()))
    assert again.block_configs[0].ffn.intermediate_size == 48
    assert not hasattr(again.block_configs[0].ffn, "ffn_mult")


def test_the_default_dtype_is_the_checkpoints(folded_output: Any, tmp_path: Path) -> None:
    directory = folded_output("llama-bf16", GROUPED)
    export(directory, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_nothing_of_ours_is_left_but_the_record(folded_output: Any, tmp_path: Path) -> None:
    export(folded_output("llama-gqa", GROUPED), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert not names & {"kv_plan.json", "kv_maps.safetensors", "report.json"}
    assert {"tokenizer.json", "README.md", "kvcompress_export.json", "generation_config.json"} <= names
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "changes", "reason"),
        [
            (FREQUENCY | {"policy": "loss", "keep": 0.6}, WIDE, "engines cache as many of both"),
            (FREQUENCY, {"num_key_value_heads": 4}, "heads 16 wide; engines have kernels for 64, 128, 256"),
        ],
        ids=["ragged", "width"],
    )
    def test_plans(
        self, folded_output: Any, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], reason: str
    ) -> None:
        directory = folded_output("llama-mha", options, **changes)
        for to in ("hf", "gguf", "vllm-decilm"):
            with pytest.raises(UnsupportedModelError, match=reason) as error:
                export(directory, tmp_path / "out", to=to)
            assert "\n" not in str(error.value) and "--key-basis grouped" in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_layers_without_rope(self, folded_output: Any, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="layer 1 has no RoPE"):
            export(folded_output("smollm3", GROUPED), tmp_path / "out")

    def test_sliding_windows_in_gguf(self, folded_output: Any, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="sliding window"):
            export(folded_output("mistral-sliding", GROUPED), tmp_path / "out.gguf", to="gguf")

    @pytest.mark.parametrize(("family", "reason"), [("qwen3", "key norm")])
    def test_models_that_cannot_be_folded(self, tiny_checkpoint: Any, tmp_path: Path, family: str, reason: str) -> None:
        with pytest.raises(UnsupportedModelError, match=f"{reason}.*coded form"):
            export(tiny_checkpoint(family), tmp_path / "out")

    def test_latent_attention(self, tmp_path: Path) -> None:
        (tmp_path / "mla").mkdir()
        (tmp_path / "mla" / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "kv_lora_rank": 512}))
        with pytest.raises(UnsupportedModelError, match=r"not known of model type 'deepseek_v3'.*coded form"):
            export(tmp_path / "mla", tmp_path / "out")

    def test_a_model_and_a_coded_output(self, tiny_checkpoint: Any, folded_output: Any, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"is a model\. Fold it first"):
            export(tiny_checkpoint("llama-gqa"), tmp_path / "out")
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "coded", CompressOptions(metric="weights"))
        with pytest.raises(OptionError, match="coded form"):
            export(tmp_path / "coded", tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"to": "onnx"}, "hf, gguf, vllm-decilm"), ({"dtype": "int4"}, "bfloat16"), ({"dtype": "q8_0"}, "--to hf")],
    )
    def test_options(self, folded_output: Any, tmp_path: Path, options: dict[str, str], reason: str) -> None:
        with pytest.raises(OptionError, match=reason):
            export(folded_output("llama-gqa", GROUPED), tmp_path / "out", **options)

    def test_targets(self, folded_output: Any, tmp_path: Path) -> None:
        directory = folded_output("llama-gqa", GROUPED)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("")
        for output, to in ((tmp_path / "full", "hf"), (tmp_path / "full", "gguf"), (directory / "in", "hf")):
            with pytest.raises(OutputError):
                export(directory, output, to=to)
        with pytest.raises(OutputError):
            export(directory, directory, force=True)


def test_decoders_commute_with_the_layout(folded_output: Any) -> None:
    """Every query head's decoder, in the stock head's layout, mixes the two numbers of a RoPE pair as one complex."""
    directory = folded_output("llama-mha", FREQUENCY, **WIDE)
    _, maps = read_output(directory)
    layer = stock_layers(open_folded(directory).spec, maps)[0]
    for head in range(4):
        decoder = layer.decoder("key", layer.groups[0], head).unflatten(0, (2, 16)).unflatten(2, (2, 16, 2))
        re_re, re_im, im_re, im_im = (decoder[a, :, b] for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)))
        torch.testing.assert_close(re_re, im_im)
        torch.testing.assert_close(re_im, -im_re)
        off = re_re.clone()
        off[torch.arange(16), torch.arange(16)] = 0
        assert off.abs().max() == 0
