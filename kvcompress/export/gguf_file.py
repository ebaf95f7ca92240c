"""A GGUF file: `llama`, or `deci` where layers cache different numbers of heads; written with the `gguf` package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.errors import OptionError, UnsupportedModelError
from kvcompress.export.gguf_tokenizer import read_vocabulary
from kvcompress.export.layout import StockLayer
from kvcompress.export.positions import Positions
from kvcompress.export.weights import exported_files

#: --dtype -> (the file type's name in GGUF, the type of matrices). Vectors are always f32.
GGUF_TYPES = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
}
_BLOCK_OF_Q8_0 = 32
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def import_gguf() -> Any:
    """Return the gguf package. Raises OptionError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise OptionError("writing GGUF needs the package gguf: pip install 'kvcompress[gguf]'.") from error
    return gguf


def check_gguf(layers: list[StockLayer]) -> None:
    """Raise UnsupportedModelError for what llama.cpp's llama and deci graphs do not have."""
    if any(layer.attention.sliding_window for layer in layers):
        raise UnsupportedModelError(
            "some layers have a sliding window, which GGUF's llama does not have: it would attend to every token. "
            "Use --to hf, or compress without --folded (coded form)."
        )


def write_gguf(
    checkpoint: Checkpoint,
    config: Any,
    layers: list[StockLayer],
    positions: Positions,
    *,
    kind: str,
    name: str,
    target: Path,
) -> None:
    """Write the file `target`. kind: a key of GGUF_TYPES; name: what general.name shows."""
    gguf = import_gguf()
    counts = [layer.n_kv_heads for layer in layers]
    arch = "llama" if len(set(counts)) == 1 else "deci"
    file_type, matrix_type = GGUF_TYPES[kind]
    writer = gguf.GGUFWriter(str(target), arch, use_temp_file=True)
    base, factors = positions.gguf_base_and_factors()
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    heads = {
        f"model.layers.{i}.self_attn.": (layer.attention.n_heads, layer.n_kv_heads) for i, layer in enumerate(layers)
    }
    for _, tensors in exported_files(checkpoint, layers, positions, dtype=torch.float32):
        for hf_name, tensor in tensors.items():
            if hf_name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            array = _interleaved(hf_name, tensor, heads).numpy()
            _add_tensor(gguf, writer, gguf_name(hf_name), array, matrix_type)
    metadata = gguf.Metadata.load(None, checkpoint.path / "absent", name, writer.get_total_parameter_count()[0])
    metadata.name = name
    metadata.size_label = gguf.size_label(*writer.get_total_parameter_count())
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    _add_sizes(writer, config, layers, base, per_layer=arch == "deci")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(gguf, writer, checkpoint.path, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(hf_name: str) -> str:
    """Return llama.cpp's name of a tensor. Raises UnsupportedModelError for one that its llama does not have."""
    module, _, kind = hf_name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    known = _NAMES.get(match[2] if match else module)
    if known is None:
        raise UnsupportedModelError(f"tensor {hf_name} has no place in a GGUF llama. Use --to hf.")
    return f"blk.{match[1]}.{known}.{kind}" if match else f"{known}.{kind}"


def _interleaved(name: str, tensor: Tensor, heads: dict[str, tuple[int, int]]) -> Tensor:
    """Return q and k rows with RoPE's pairs side by side, as llama.cpp's llama rotates them; others as they are."""
    prefix, _, projection = name.partition("self_attn.")
    if not projection.startswith(("q_proj", "k_proj")):
        return tensor
    n_heads = heads[f"{prefix}self_attn."][projection.startswith("k_proj")]
    return tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_tensor(gguf: Any, writer: Any, name: str, array: np.ndarray[Any, Any], matrix_type: str) -> None:
    """Add a tensor; matrices in the wanted type, or f16 where their rows are no whole blocks of it."""
    if array.ndim < 2 or matrix_type == "F32":
        writer.add_tensor(name, array)
        return
    if matrix_type == "Q8_0" and array.shape[-1] % _BLOCK_OF_Q8_0:
        matrix_type = "F16"
    kind = gguf.GGMLQuantizationType[matrix_type]
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _add_sizes(writer: Any, config: Any, layers: list[StockLayer], freq_base: float, *, per_layer: bool) -> None:
    head_dim = layers[0].head_dim
    n_heads, counts = [layer.attention.n_heads for layer in layers], [layer.n_kv_heads for layer in layers]
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([config.intermediate_size] * len(layers) if per_layer else config.intermediate_size)
    writer.add_head_count(n_heads if per_layer else n_heads[0])
    writer.add_head_count_kv(counts if per_layer else counts[0])
    writer.add_rope_freq_base(freq_base)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)


def _add_tokenizer(gguf: Any, writer: Any, directory: Path, vocab_size: int) -> None:
    vocabulary = read_vocabulary(directory, vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = gguf.SpecialVocab(directory, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    for kind, added in added_tokens(directory).items():
        special.add_special_token.setdefault(kind, added)
    special.add_to_gguf(writer, quiet=True)


def added_tokens(directory: Path) -> dict[str, bool]:
    """Return whether the tokenizer puts its begin and end tokens around a text, which llama.cpp must be told."""
    tokenizer = load_tokenizer(directory)
    plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    begin, end = (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else ([], [])
    return {"bos": tokenizer.bos_token_id in begin, "eos": tokenizer.eos_token_id in end}
