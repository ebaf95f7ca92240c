"""`kvcompress inspect`."""

from __future__ import annotations

import json

from transformers import AutoConfig, AutoModelForCausalLM

from tests.cli.test_app import run_process
from tests.models.small import EARLIER, small_model

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "pad_token_id": 0,
}


def make_model(directory, model_type, **changes):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **changes)).save_pretrained(directory)
    return directory


def test_json_states_sizes_and_forms(kvcompress, model):
    document = json.loads(kvcompress("inspect", model, "--json").stdout)
    assert document["architecture"] == "llama"
    assert document["dtype"] == "bfloat16"
    assert (document["layers"], document["query_heads"], document["kv_heads"], document["head_dim"]) == (4, 4, 2, 16)
    assert document["rotary_dim"] == 16
    per_token = 4 * 2 * 2 * 16 * 2  # layers, parts, heads, head_dim, bytes
    assert document["cache_bytes_per_token"] == per_token
    sizes = {entry["tokens"]: entry["bytes"] for entry in document["cache_bytes"]}
    assert sizes == {n: n * per_token for n in (2048, 8192, 32768, 131072)}
    assert document["weight_bytes"] < (model / "model.safetensors").stat().st_size
    assert all(answer == {"possible": True, "why_not": None} for answer in document["forms"].values())


def test_it_imports_neither_torch_nor_transformers(model):
    process = run_process("inspect", model, "--json")
    assert process.stderr == "imported: []\n"
    assert json.loads(process.stdout)["layers"] == 4


def test_key_norms_rule_out_folded_and_data_free(kvcompress, tmp_path):
    source = make_model(tmp_path / "m", "qwen3", num_key_value_heads=2)
    forms = json.loads(kvcompress("inspect", source, "--json").stdout)["forms"]
    assert forms["coded"]["possible"] and forms["maps_only"]["possible"]
    assert not forms["folded"]["possible"] and "norm" in forms["folded"]["why_not"]
    assert not forms["data_free"]["possible"] and "norm" in forms["data_free"]["why_not"]
    table = kvcompress("inspect", source).stdout
    assert "not folded: keys are normalised" in table


def test_one_kv_head_rules_out_mixing_heads(kvcompress, tmp_path):
    source = make_model(tmp_path / "m", "llama", num_key_value_heads=1)
    document = json.loads(kvcompress("inspect", source, "--json").stdout)
    possible = {name for name, answer in document["key_bases"].items() if answer["possible"]}
    assert possible == {"band", "per_head", "latent"}
    assert not document["forms"]["folded"]["possible"]


def test_layers_without_rope_are_named(kvcompress, tmp_path):
    source = make_model(tmp_path / "m", "smollm3", num_key_value_heads=2, no_rope_layers=[1, 1, 1, 0])
    document = json.loads(kvcompress("inspect", source, "--json").stdout)
    assert document["layers_without_rope"] == [3]
    assert "none in 1 of the layers" in kvcompress("inspect", source).stdout


def test_what_only_running_tells_is_not_guessed(kvcompress, tmp_path):
    """Latent attention: the latent and its rotated part are the sites, and how they turn is not known from files."""
    small_model("deepseek_v3").save_pretrained(tmp_path / "m")
    document = json.loads(kvcompress("inspect", tmp_path / "m", "--json").stdout)
    heads_own = {"layers": 4, "keys": 128, "values": 64}  # what transformers' cache holds before it holds the latent
    keys, values = (128, 64) if EARLIER and document["sites"] == [heads_own] else (32, 8)
    assert document["sites"] == [{"layers": 4, "keys": keys, "values": values}]
    assert document["rotary_dim"] is None and document["query_heads"] == (4 if keys == 128 else None)
    assert document["layers_without_rope"] == [] and document["read_by"] == "running the model"
    table = " ".join(kvcompress("inspect", tmp_path / "m").stdout.split())
    assert "proven when it is compressed" in table and "RoPE on" not in table
    assert f"{keys} numbers a token as keys, {values} as values, in 4 layers" in table


def test_the_table_reads_like_the_json(kvcompress, model):
    table = kvcompress("inspect", model).stdout
    assert "4 query, 2 key/value, 16 wide" in table
    assert "512 bytes a token" in table
    assert "coded, maps only, folded, data free" in table


def test_no_checkpoint_is_one_line(fails, tmp_path):
    assert "has no config.json" in fails("inspect", tmp_path)
    assert "neither a directory" in fails("inspect", tmp_path / "nothing" / "here")
    (tmp_path / "config.json").write_text('{"model_type": "gpt3"}')
    assert "holds no model.safetensors" in fails("inspect", tmp_path)
