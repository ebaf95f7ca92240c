"""Models of many sizes for measure_scale.py: their shapes, checkpoints of random weights, and what one would hold."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvcompress.bench.random_model import llama_config
from kvcompress.bench.workload import Shape
from kvcompress.checkpoint.headers import TensorEntry
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.model.architectures import read_model_spec

#: name: heads, KV heads, width of a head, layers, hidden size, width of the MLP, vocabulary.
SHAPES = {
    name: Shape(name, *sizes)
    for name, sizes in {
        "tiny": (4, 2, 16, 4, 64, 128, 49152),
        "0.1b": (12, 4, 64, 12, 768, 2048, 49152),
        "0.5b": (20, 5, 64, 20, 1280, 3584, 49152),
        "1b": (32, 8, 64, 16, 2048, 8192, 128256),
        "3b": (24, 8, 128, 28, 3072, 8192, 128256),
        "8b": (32, 8, 128, 32, 4096, 14336, 128256),
        "14b": (40, 8, 128, 48, 5120, 13824, 128256),
        "30b": (64, 8, 128, 58, 5120, 25600, 151936),
        "32b": (64, 8, 128, 64, 5120, 25600, 151936),
        "70b": (64, 8, 128, 80, 8192, 28672, 128256),
        "405b": (128, 8, 128, 126, 16384, 53248, 128256),
    }.items()
}


def tensors_of(shape: Shape) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the tensors of each file of a checkpoint: a layer each, and the rest."""
    d, heads, kv = shape.d_model, shape.n_heads * shape.head_dim, shape.width
    layer = {
        "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (heads, d),
        "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, heads),
        "mlp.gate_proj": (shape.d_mlp, d), "mlp.up_proj": (shape.d_mlp, d), "mlp.down_proj": (d, shape.d_mlp),
    }  # fmt: skip
    files = {
        f"layer-{i:03d}.safetensors": {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
        for i in range(shape.n_layers)
    }
    outside = {
        "model.embed_tokens.weight": (shape.n_vocab, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (shape.n_vocab, d),
    }
    return {"outside.safetensors": outside} | files


def config_of(shape: Shape) -> dict[str, Any]:
    found: dict[str, Any] = llama_config(shape).to_dict()
    return found | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False}


def imagined(shape: Shape) -> Checkpoint:
    """Return a checkpoint of which there are only the sizes."""
    entries = {
        name: TensorEntry(file, size, "BF16")
        for file, sizes in tensors_of(shape).items()
        for name, size in sizes.items()
    }
    config = config_of(shape)
    return Checkpoint(Path(), shape.name, config, read_model_spec(config), entries)


def make(shape: Shape, directory: Path, tokenizer: Path, device: str) -> None:
    """Write a checkpoint of random weights, some layers at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, directory)
    files = tensors_of(shape)
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda item: write(directory / item[1][0], item[1][1], item[0], device), enumerate(files.items()))
        )
    (directory / "config.json").write_text(json.dumps(config_of(shape)), encoding="utf-8")
    where = {name: file for file, sizes in files.items() for name in sizes}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


def write(file: Path, sizes: dict[str, tuple[int, ...]], seed: int, device: str) -> None:
    """Write a file of random weights, a tensor at a time; threads do it side by side, as safetensors' own do not."""
    header, end = dict[str, Any](), 0
    for name, size in sizes.items():
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(seed)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            weight = torch.empty(size, dtype=torch.bfloat16, device=device).fill_(1.0)
            if len(size) > 1:
                weight.normal_(0, 0.02, generator=generator)
            left = memoryview(weight.cpu().flatten().view(torch.uint8).numpy())
            while left:  # a call writes 2 GB at most
                left = left[out.write(left) :]
