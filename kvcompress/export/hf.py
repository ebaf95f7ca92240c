"""A plain Hugging Face checkpoint: `llama` where every layer caches as many heads, DeciLM where layers differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.maps import MAPS_FILE
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.writer import copy_checkpoint
from kvcompress.errors import UnsupportedModelError
from kvcompress.export.layout import StockLayer
from kvcompress.export.positions import Positions
from kvcompress.export.weights import exported_files
from kvcompress.plan import PLAN_FILE, REPORT_FILE

#: Config fields that mean the same in every family and in llama.
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
#: The file with DeciLM's config class, which goes along with such a checkpoint.
_DECILM_CONFIG = "configuration_decilm.py"


def check_llama(layers: list[StockLayer]) -> None:
    """Raise UnsupportedModelError where layers cache different numbers of heads, which llama cannot say."""
    counts = sorted({layer.n_kv_heads for layer in layers})
    if len(counts) > 1:
        raise UnsupportedModelError(
            f"layers cache {counts[0]} to {counts[-1]} heads; a llama checkpoint has as many in every layer. "
            "Use --to vllm-decilm or --to gguf, or compress with --policy uniform."
        )


def write_hf(
    checkpoint: Checkpoint,
    config: Any,
    layers: list[StockLayer],
    positions: Positions,
    *,
    dtype: torch.dtype,
    target: Path,
    decilm: bool = False,
) -> None:
    """Write a checkpoint directory that transformers and vLLM load with no code of ours (DeciLM: vLLM only)."""
    ours = {PLAN_FILE, MAPS_FILE, REPORT_FILE, "README.md", "SOURCE_README.md"}
    indexes = {"model.safetensors.index.json"}
    copy_checkpoint(checkpoint.path, target, weights=frozenset(), skip=frozenset(ours | indexes))
    fields = hf_config(config, layers, positions, dtype=dtype)
    if decilm:
        fields = decilm_config(fields, layers)
        source = Path(__file__).with_name("decilm_config.py")
        shutil.copyfile(source, target / _DECILM_CONFIG)
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    _write_weights(checkpoint, layers, positions, dtype=dtype, target=target)


def hf_config(config: Any, layers: list[StockLayer], positions: Positions, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the exported model.

    config: the original's transformers config. Raises UnsupportedModelError for layers that llama does not have.
    """
    name = str(dtype).removeprefix("torch.")
    sliding = {layer.attention.sliding_window for layer in layers}
    mistral = sliding != {None} and len(sliding) == 1 and not has_biases(layers)
    if sliding != {None} and not mistral:
        raise UnsupportedModelError(
            "some layers have a sliding window, which no llama or mistral checkpoint can say. "
            "Compress without --folded: the coded form runs them."
        )
    values = config.to_dict()
    fields = {key: values[key] for key in _KEPT if key in values}
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        **({"sliding_window": sliding.pop()} if mistral else {"attention_bias": has_biases(layers), "mlp_bias": False}),
        **fields,
        "num_key_value_heads": layers[0].n_kv_heads,
        "head_dim": layers[0].head_dim,
        **positions.hf_fields(),
        "dtype": name,
        "torch_dtype": name,
    }


def decilm_config(fields: dict[str, Any], layers: list[StockLayer]) -> dict[str, Any]:
    """Return the llama fields as DeciLM's, with the number of query heads for each cached head in every layer."""
    blocks = [
        {
            "attention": {
                "n_heads_in_group": layer.attention.n_heads // layer.n_kv_heads,
                "no_op": False,
                "replace_with_linear": False,
            },
            "ffn": {"intermediate_size": fields["intermediate_size"], "no_op": False, "replace_with_linear": False},
        }
        for layer in layers
    ]
    return fields | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_key_value_heads": max(layer.n_kv_heads for layer in layers),
        "block_configs": blocks,
    }


def has_biases(layers: list[StockLayer]) -> bool:
    """Return whether projections of keys have a bias: in all layers, or in none."""
    return layers[0].attention.projection("key").bias is not None


def _write_weights(
    checkpoint: Checkpoint, layers: list[StockLayer], positions: Positions, *, dtype: torch.dtype, target: Path
) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in exported_files(checkpoint, layers, positions, dtype=dtype):
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
