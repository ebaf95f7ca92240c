"""GGUF files, read back by transformers' own loader and by the gguf package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import kvcompress
from kvcompress.errors import CheckpointError, UnsupportedModelError
from kvcompress.export.export import export
from kvcompress.export.gguf_file import added_tokens
from kvcompress.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, read_vocabulary
from kvcompress.export.verify import verify
from tests.export_cases import EXACT, FREQUENCY, GROUPED, WIDE
from tests.tiny_models import build_tokenizer, random_ids


def contents(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (metadata, tensors in float32) of a GGUF file."""
    reader = gguf.GGUFReader(file)
    fields = {name: f.contents() for name, f in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def half_split(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows."""
    return rows.reshape(n_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-tied", "llama-sharded"])
def test_transformers_reads_it_back(folded_output: Any, tmp_path: Path, family: str) -> None:
    """An independent reader of GGUF gives the folded model's logits."""
    directory = folded_output(family, GROUPED)
    export(directory, tmp_path / "x.gguf", to="gguf", dtype="f32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).eval()
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, kvcompress.load(directory)(ids).logits, **EXACT)
    assert model.config.num_key_value_heads == (2 if family == "llama-mha" else 1)


@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "llama-bias"])
def test_tensors_are_those_of_the_hf_export(folded_output: Any, tmp_path: Path, family: str) -> None:
    """Rows in llama.cpp's order, RoPE as one list of factors with base 1, biases as vectors of float32."""
    directory = folded_output(family, FREQUENCY, **WIDE)
    export(directory, tmp_path / "hf", dtype="float32")
    export(directory, tmp_path / "x.gguf", to="gguf", dtype="f32")
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    fields, tensors = contents(tmp_path / "x.gguf")
    for i in range(3):
        for name, n_heads in (("q", 8), ("k", 1)):
            for kind in ("weight", "bias"):
                if (key := f"model.layers.{i}.self_attn.{name}_proj.{kind}") in expected:
                    found = half_split(tensors[f"blk.{i}.attn_{name}.{kind}"], n_heads)
                    np.testing.assert_array_equal(found, expected[key].numpy())
        for name, theirs in (("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output")):
            key = f"model.layers.{i}.{name}.weight"
            np.testing.assert_array_equal(tensors[f"blk.{i}.{theirs}.weight"], expected[key].numpy())
    assert len(tensors) == len(expected) + 1
    factors = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]["short_factor"]
    np.testing.assert_allclose(tensors["rope_freqs.weight"], factors, rtol=1e-7)
    assert fields["llama.rope.freq_base"] == 1.0
    assert (fields["llama.attention.key_length"], fields["llama.attention.head_count_kv"]) == (64, 1)


@pytest.mark.parametrize("family", ["llama-llama3", "llama-yarn"])
def test_scaled_rope_is_a_list_of_factors(folded_output: Any, tmp_path: Path, family: str) -> None:
    """Heads stay as they are, so theta stays; yarn's attention factor moves into the queries."""
    directory = folded_output(family, GROUPED)
    export(directory, tmp_path / "hf", dtype="float32")
    export(directory, tmp_path / "x.gguf", to="gguf", dtype="f32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    rotary = model.model.rotary_emb
    fields, tensors = contents(tmp_path / "x.gguf")
    angles = fields["llama.rope.freq_base"] ** (-np.arange(4) / 4) / tensors["rope_freqs.weight"]
    np.testing.assert_allclose(angles, rotary.inv_freq.numpy(), rtol=1e-6)
    wanted = model.model.layers[0].self_attn.q_proj.weight.detach().numpy() * rotary.attention_scaling**2
    np.testing.assert_allclose(half_split(tensors["blk.0.attn_q.weight"], 4), wanted, rtol=1e-5)
    assert (rotary.attention_scaling > 1) == (family == "llama-yarn")


def test_layers_with_different_groups_are_deci(folded_output: Any, tmp_path: Path) -> None:
    directory = folded_output("llama-mha", GROUPED | {"policy": "middle", "layers": "1:3", "keep": 0.67})
    export(directory, tmp_path / "x.gguf", to="gguf")
    fields, tensors = contents(tmp_path / "x.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count_kv"] == [4, 2, 2]
    assert fields["deci.feed_forward_length"] == [48, 48, 48]
    assert [tensors[f"blk.{i}.attn_k.weight"].shape[0] for i in range(3)] == [32, 16, 16]


@pytest.mark.parametrize(
    ("dtype", "file_type", "matrix", "error"),
    [("f32", 0, "F32", 0.0), ("f16", 1, "F16", 1e-3), ("bf16", 32, "BF16", 1e-2), ("q8_0", 7, "Q8_0", 1e-2)],
)
def test_weight_types(
    folded_output: Any,
    tmp_path: Path,
    dtype: str,
    file_type: int,
    matrix: str,
    error: float,
) -> None:
    directory = folded_output("llama-gqa", GROUPED)
    export(directory, tmp_path / "exact.gguf", to="gguf", dtype="f32")
    export(directory, tmp_path / "x.gguf", to="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.file_type"].contents() == file_type
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == matrix  # rows of 32
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else matrix)  # rows of 48
    exact, found = contents(tmp_path / "exact.gguf")[1], contents(tmp_path / "x.gguf")[1]
    for name, tensor in exact.items():
        assert np.abs(tensor - found[name]).max() <= error * np.abs(tensor).max()


def test_metadata_and_tokenizer(folded_output: Any, tmp_path: Path) -> None:
    directory = folded_output("llama-gqa", GROUPED)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    export(directory, tmp_path / "x.gguf", to="gguf")
    fields, _ = contents(tmp_path / "x.gguf")
    document = json.loads((directory / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 320 and all(tokens[i] == token for token, i in document["model"]["vocab"].items())
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [CONTROL] * 3 and set(kinds[3:]) <= {NORMAL, UNUSED}
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    assert ids == {"bos": 1, "eos": 2}
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["llama.context_length"] == 512 and fields["llama.vocab_size"] == 320


def write_tokenizer(directory: Path, **changes: Any) -> Path:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | changes.pop("model", {})
    document = {"model": model, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}} | changes
    (directory / "tokenizer.json").write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize(("template", "added"), [("<s> $A", (True, False)), ("$A </s>", (False, True))])
def test_tokens_that_the_tokenizer_adds(tmp_path: Path, template: str, added: tuple[bool, bool]) -> None:
    tokenizer = build_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save_pretrained(tmp_path)
    assert added_tokens(tmp_path) == {"bos": added[0], "eos": added[1]}


class TestVocabulary:
    def test_missing_ids_are_unused(self, tmp_path: Path) -> None:
        vocabulary = read_vocabulary(write_tokenizer(tmp_path), 5)
        assert vocabulary.tokens == ["a", "b", "ab", "[PAD3]", "[PAD4]"]
        assert vocabulary.types == [NORMAL] * 3 + [UNUSED] * 2

    def test_known_ways_to_split(self, tmp_path: Path) -> None:
        byte_level = {"type": "ByteLevel", "use_regex": False}
        llama3 = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        for pattern, name in ((llama3, "llama-bpe"), (llama3.replace("{1,3}", ""), "qwen2")):
            steps = [{"type": "Split", "pattern": {"Regex": pattern}}, byte_level]
            write_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
            assert read_vocabulary(tmp_path, 3).pre == name
        steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
        write_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        assert read_vocabulary(tmp_path, 3).pre == "smollm"

    @pytest.mark.parametrize(
        "damage",
        [
            {"model": None},
            {"model": {"merges": []}},
            {"model": {"vocab": {}, "merges": []}},
            {"model": {"vocab": {"a": 1 << 40}, "merges": []}},
            {"model": {"vocab": {"a": "b"}, "merges": []}},
            {"model": {"vocab": {"a": 0}, "merges": [3], "byte_fallback": True}},
            {"added_tokens": [{"id": 0}]},
            {"pre_tokenizer": {"type": "Split"}},
        ],
    )
    def test_a_damaged_file_is_said_to_be(self, tmp_path: Path, damage: dict[str, Any]) -> None:
        write_tokenizer(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | damage))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
            read_vocabulary(tmp_path, 3)

    def test_byte_fallback_is_sentencepiece(self, tmp_path: Path) -> None:
        vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁ab": 7}
        model = {"byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": [["a", "b"], ["▁", "ab"]]}
        added = [{"id": i, "content": c, "special": True} for i, c in enumerate(("<unk>", "<s>"))]
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
        write_tokenizer(tmp_path, model=model, added_tokens=added, normalizer=normalizer, pre_tokenizer=None)
        vocabulary = read_vocabulary(tmp_path, 8)
        assert (vocabulary.model, vocabulary.space_prefix) == ("llama", True)
        assert vocabulary.types == [UNKNOWN, CONTROL, BYTE] + [NORMAL] * 5
        assert vocabulary.scores is not None and vocabulary.scores[6] > vocabulary.scores[7] > vocabulary.scores[4]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"pre_tokenizer": {"type": "Metaspace"}}, "no known name in llama.cpp"),
            ({"model": {"type": "Unigram"}}, "Unigram model"),
        ],
    )
    def test_others_are_refused(self, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(UnsupportedModelError, match=reason):
            read_vocabulary(write_tokenizer(tmp_path, **changes), 3)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json"):
            read_vocabulary(tmp_path, 3)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(("family", "options", "changes"), [("llama-mha", GROUPED, {}), ("qwen2", FREQUENCY, WIDE)])
def test_llama_cpp_runs_it(
    folded_output: Any,
    tmp_path: Path,
    text_file: Path,
    family: str,
    options: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    directory = folded_output(family, options, **changes)
    result = export(directory, tmp_path / "x.gguf", to="gguf", dtype="f32")
    checks, missing = verify(directory, result, text=str(text_file))
    assert missing == [] and [c.passed for c in checks] == [True], checks
