"""export(): a folded output -> a checkpoint or file that stock engines run, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.headers import read_config
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint, open_folded
from kvcompress.checkpoint.writer import atomic_directory, atomic_file, check_space, check_target
from kvcompress.compat import configuration
from kvcompress.errors import CheckpointError, OptionError, OutputError, UnsupportedModelError
from kvcompress.export.card import export_card
from kvcompress.export.gguf_file import GGUF_TYPES, check_gguf, import_gguf, write_gguf
from kvcompress.export.hf import check_llama, write_hf
from kvcompress.export.layout import StockLayer, stock_layers
from kvcompress.export.positions import export_positions
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import DTYPE_BYTES, ModelSpec, Site
from kvcompress.plan import PLAN_FILE, Plan
from kvcompress.runtime.head_norm import HEAD_NORM
from kvcompress.runtime.output import read_output
from kvcompress.site_plan import SitePlan

TARGETS = ("hf", "gguf", "vllm-decilm")
RECORD_FILE = "kvcompress_export.json"
#: Bits of a weight; q8_0 has a 16-bit scale for 32 numbers.
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}
_GGUF_OF_HF = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what it costs: weights and cache in bytes, against the model that was compressed."""

    output: Path
    target: str
    dtype: str
    plan: Plan
    n_kv_heads: tuple[int, ...]
    n_virtual: int
    head_dim: int
    weight_bytes: int

    @property
    def cache_numbers_per_token(self) -> int:
        return 2 * self.head_dim * sum(self.n_kv_heads)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the engine's cache for one token, in the dtype of the model that was compressed."""
        return self.cache_numbers_per_token * DTYPE_BYTES[self.plan.dtype]

    @property
    def original_weight_bytes(self) -> int:
        """Weights of the model that was compressed, had they been written in this export's dtype."""
        return round(self.plan.weight_bytes * _BITS[self.dtype] / 8 / DTYPE_BYTES[self.plan.dtype])

    @property
    def extra_weight_bytes(self) -> int:
        return self.weight_bytes - self.original_weight_bytes

    @property
    def pays_from_tokens(self) -> int:
        """Cached tokens, over all sequences, from which the smaller cache outweighs the larger weights; 0: at once."""
        saved = self.plan.original_bytes_per_token - self.cache_bytes_per_token
        return max(0, -(-self.extra_weight_bytes // max(1, saved)))

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "to": self.target,
            "dtype": self.dtype,
            "kv_heads_per_layer": list(self.n_kv_heads),
            "virtual_heads_in_a_head": self.n_virtual,
            "head_dim": self.head_dim,
            "keep": self.cache_bytes_per_token / self.plan.original_bytes_per_token,
            "cache_bytes_per_token": {
                "original": self.plan.original_bytes_per_token,
                "exported": self.cache_bytes_per_token,
            },
            "weight_bytes": {"original": self.original_weight_bytes, "exported": self.weight_bytes},
            "pays_from_cached_tokens": self.pays_from_tokens,
        }


def export(
    directory: str | Path, output: str | Path, *, to: str = "hf", dtype: str = "auto", force: bool = False
) -> ExportResult:
    """Write the folded output `directory` for stock engines: a directory (hf, vllm-decilm) or a file (gguf).

    dtype: float32, float16, bfloat16 (or f32, f16, bf16); for gguf also q8_0; auto is the checkpoint's own. Raises
    UnsupportedModelError for what cannot be written so, with the reason and the way out; nothing is left behind.
    """
    directory, output = Path(directory), Path(output)
    plain = _check_source(directory)
    if plain:
        with open_checkpoint(directory) as whole:
            checkpoint, plan = whole, plain_plan(whole)
            maps: dict[Site, SiteMaps] = {}
    else:
        (plan, maps), checkpoint = read_output(directory), open_folded(directory)
    _check_no_head_norm(directory, checkpoint)
    dtype = export_dtype(to, dtype, plan)
    if to == "gguf":
        import_gguf()
    _check_target(output, directory, to, force=force)
    layers = plan_layers(checkpoint.spec, maps, to)
    config = _config(directory)
    positions = export_positions(config, checkpoint.spec, layers[0].n_virtual, scaled_by_engine=to != "gguf")
    bytes_ = exported_weight_bytes(checkpoint, layers, dtype)
    check_space(output, bytes_)
    result = ExportResult(
        output=output,
        target=to,
        dtype=dtype,
        plan=plan,
        n_kv_heads=tuple(layer.n_kv_heads for layer in layers),
        n_virtual=layers[0].n_virtual,
        head_dim=layers[0].head_dim,
        weight_bytes=bytes_,
    )
    if to == "gguf":
        with atomic_file(output) as scratch:
            name = Path(plan.source).name
            write_gguf(checkpoint, config, layers, positions, kind=dtype, name=name, target=scratch)
        return result
    with atomic_directory(output, force=force) as scratch:
        torch_dtype = getattr(torch, dtype)
        write_hf(checkpoint, config, layers, positions, dtype=torch_dtype, target=scratch, decilm=to == "vllm-decilm")
        (scratch / "README.md").write_text(export_card(plan, result.to_json()), encoding="utf-8")
        record = {k: v for k, v in result.to_json().items() if k != "output"} | {"plan": plan.options}
        (scratch / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return result


def plan_layers(spec: ModelSpec, maps: dict[Site, SiteMaps], to: str) -> list[StockLayer]:
    """Return the layers as the engine will have them. Raises UnsupportedModelError where it cannot."""
    without = [a.layer for a in spec.layers if not a.rotary_dim]
    if without:
        raise UnsupportedModelError(
            f"layer {without[0]} has no RoPE; the llama of every engine rotates all layers. "
            "Compress without --folded (coded form)."
        )
    layers = stock_layers(spec, maps)
    if to == "hf":
        check_llama(layers)
    if to == "gguf":
        check_gguf(layers)
    return layers


def export_dtype(to: str, dtype: str, plan: Plan) -> str:
    """Return the dtype of the exported weights as the target calls it. Raises OptionError."""
    if to not in TARGETS:
        raise OptionError(f"target '{to}' is unknown. Choose --to from {', '.join(TARGETS)}.")
    short = {v: k for k, v in _GGUF_OF_HF.items()}
    name = plan.dtype if dtype == "auto" else short.get(dtype, dtype)
    if to == "gguf":
        name = _GGUF_OF_HF.get(name, name)
        if name not in GGUF_TYPES:
            raise OptionError(f"dtype '{dtype}' is unknown. Choose from {', '.join(GGUF_TYPES)} with --to gguf.")
    elif name not in DTYPE_BYTES:
        raise OptionError(f"dtype '{dtype}' is unknown. Choose from {', '.join(DTYPE_BYTES)} with --to {to}.")
    return name


def exported_weight_bytes(checkpoint: Checkpoint, layers: list[StockLayer], dtype: str) -> int:
    """Return the bytes of the weights to be written: q and o projections are r times those of the original."""
    grown = {f"model.layers.{x.attention.layer}.self_attn.{p}_proj" for x in layers for p in "qo"}
    total = 0
    for name, entry in checkpoint.tensors.items():
        numbers = entry.n_numbers
        module, _, kind = name.rpartition(".")
        if module in grown and (kind == "weight" or module.endswith("q_proj")):
            numbers *= layers[0].n_virtual
        total += numbers
    return round(total * _BITS[dtype] / 8)


def _config(directory: Path) -> Any:
    try:
        return configuration(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot read {directory}: {str(error).splitlines()[0]}") from error


def plain_plan(checkpoint: Checkpoint) -> Plan:
    """Return the plan of a model that is written as it is: every site whole."""
    spec = checkpoint.spec
    bits = 8 * DTYPE_BYTES[spec.dtype]
    sites = (
        SitePlan(
            layer=site.layer,
            part=site.part,
            basis="exact",
            width=spec.width(site),
            bits=((bits, spec.width(site)),),
            predicted_loss=0.0,
            block_width=spec.width(site),
            rotated=site.part == "key",
        )
        for site in spec.sites
    )
    return Plan(
        form="folded",
        source=str(checkpoint.path.absolute()),
        source_fingerprint=checkpoint.fingerprint(),
        architecture=spec.architecture,
        dtype=spec.dtype,
        sites=tuple(sites),
        sinks=0,
        recent=0,
        options={},
        calibration={},
        loss_in_nats=False,
        maps_bytes=0,
        weight_bytes=checkpoint.weight_bytes,
    )


def _check_source(directory: Path) -> bool:
    """Return whether it is a model with fused projections, to be written whole as a llama; False for a folded output.

    Raises for everything else what stands in its way: first of all what the model itself is.
    """
    spec = read_model_spec(read_config(directory)) if (directory / "config.json").is_file() else None
    planned = (directory / PLAN_FILE).is_file()
    key_norm = spec is not None and any(a.key_norm for a in spec.layers)
    if spec and not planned and not key_norm and spec.is_fused:
        return True
    if spec and spec.foldable_obstacle:
        raise UnsupportedModelError(
            f"{directory} cannot be exported: {spec.foldable_obstacle}. "
            "Compress without --folded and run the coded form with kvcompress.load."
        )
    if spec and not planned:
        raise OptionError(f"{directory} is a model. Fold it first: kvcompress compress {directory} OUT --folded.")
    form = Plan.load(directory).form
    if form != "folded":
        raise OptionError(
            f"{directory} is in the {form} form, which only kvcompress runs. Compress with --folded to export it."
        )
    return False


def _check_no_head_norm(directory: Path, checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError for a model healed with a norm of head outputs."""
    if any(f".{HEAD_NORM}." in name for name in checkpoint.tensors):
        raise UnsupportedModelError(
            f"{directory} was healed with a norm of every head's output before o_proj (head_norm). It divides by a "
            "number that depends on the token, which no weight of a stock engine can take up; only its learned "
            "weights could be folded into o_proj. Heal without --head-norm to export, or run it with kvcompress.load."
        )


def _check_target(output: Path, directory: Path, to: str, *, force: bool) -> None:
    """Raise OutputError if the output cannot be written there. The folded directory is never written to."""
    if output.resolve().is_relative_to(directory.resolve()) or directory.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} overlaps {directory}, which is never written to. Choose another.")
    if to != "gguf":
        check_target(output, force=force)
    elif output.is_dir():
        raise OutputError(
            f"{output} is a directory; --to gguf writes a file. Name it, for example {output}/model.gguf."
        )
    elif output.exists() and not force:
        raise OutputError(f"{output} exists. Choose another name, or replace it with --force.")
