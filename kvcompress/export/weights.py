"""The weights of an exported model: query and output projections take up the decoders, one file at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.export.layout import StockLayer
from kvcompress.export.positions import Positions
from kvcompress.model.model_spec import AttentionSpec


def exported_files(
    checkpoint: Checkpoint, layers: list[StockLayer], positions: Positions, *, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (file name, tensors in `dtype`) for every weight file of a folded checkpoint, rewritten for an engine.

    Where the model has biases, an output bias of zeros is added if it has none: `llama` has all four or none.
    """
    from safetensors.torch import load_file

    changed = {
        f"{_attention(layer)}.{name}": (layer, name[0])
        for layer in layers
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        tensors: dict[str, Tensor] = {}
        for name, tensor in separate(load_file(checkpoint.path / file), layers[0].attention):
            module, _, kind = name.rpartition(".")
            if module in changed:
                layer, which = changed[module]
                tensor = exported_tensor(layer, positions, which, tensor, kind)
                if (
                    which == "o"
                    and layer.attention.projection("key").bias
                    and f"{module}.bias" not in checkpoint.tensors
                ):
                    tensors[f"{module}.bias"] = torch.zeros(len(tensor), dtype=dtype)
            tensors[name] = tensor.to(dtype).contiguous()
        yield file, tensors


def separate(tensors: dict[str, Tensor], attention: AttentionSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), phi3's fused projections cut into those that llama has."""
    widths = [attention.n_heads * attention.head_dim, attention.width, attention.width]
    for name, tensor in tensors.items():
        if name.endswith("qkv_proj.weight"):
            for part, rows in zip("qkv", tensor.split(widths), strict=True):
                yield name.replace("qkv_proj", f"{part}_proj"), rows
        elif name.endswith("gate_up_proj.weight"):
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj"), rows
        else:
            yield name, tensor


def exported_tensor(layer: StockLayer, positions: Positions, which: str, tensor: Tensor, kind: str) -> Tensor:
    """Return the weight or bias (`kind`) of projection q, k, v or o of a layer as the engine needs it."""
    if which == "q":
        return query_rows(layer, positions, tensor)
    if which == "k":
        return tensor[layer.cached_rows("key")]
    if which == "v":
        return tensor[layer.cached_rows("value")]
    return output_columns(layer, tensor) if kind == "weight" else tensor


def query_rows(layer: StockLayer, positions: Positions, tensor: Tensor) -> Tensor:
    """Return D^T W for every query head, in the groups' order: [n_heads * d, ...] -> [n_heads * r * d, ...].

    Scaled by sqrt(r), because an engine divides scores by the square root of the wide head's width.
    """
    d = layer.attention.head_dim
    heads = tensor.double().unflatten(0, (layer.attention.n_heads, d))
    scale = torch.full((layer.head_dim,), float(layer.n_virtual) ** 0.5, dtype=torch.float64)
    rotated = (positions.inv_freq > 0).repeat(2)
    scale[rotated] *= positions.score_scale
    decoders = _decoders_by_query(layer, "key")
    rows = [torch.einsum("cD,c...->D...", decoders[q], heads[q]) for q in layer.query_order]
    wide = torch.stack(rows)  # [n_heads, r * d, ...]
    return (wide * scale.reshape(1, -1, *[1] * (wide.dim() - 2))).flatten(0, 1)


def output_columns(layer: StockLayer, weight: Tensor) -> Tensor:
    """Return W_o D for every query head, in the groups' order: [hidden, n_heads * d] -> [hidden, n_heads * r * d]."""
    heads = weight.double().unflatten(1, (layer.attention.n_heads, layer.attention.head_dim))
    decoders = _decoders_by_query(layer, "value")
    return torch.cat([heads[:, q] @ decoders[q] for q in layer.query_order], 1)


def _decoders_by_query(layer: StockLayer, part: str) -> dict[int, Tensor]:
    """Return for each query head what decodes its KV head from the stock head that it will read: [d, r * d]."""
    per_head = layer.attention.n_heads // layer.attention.n_kv_heads
    decoders: dict[int, Tensor] = {}
    for group in layer.groups:
        for head in group.heads:
            decoder = layer.decoder(part, group, head)  # type: ignore[arg-type]
            decoders |= dict.fromkeys(range(head * per_head, (head + 1) * per_head), decoder)
    return decoders


def _attention(layer: StockLayer) -> str:
    return layer.attention.projection("key").module.rpartition(".")[0]
