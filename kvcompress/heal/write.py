"""A healed output: the files of the one it was made from, with trained maps and weights and what the training was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, save_maps
from kvcompress.checkpoint.writer import copy_checkpoint
from kvcompress.documents import DocumentError, read_json
from kvcompress.errors import CheckpointError
from kvcompress.evaluations import EVALUATIONS_FILE
from kvcompress.model.model_spec import Site
from kvcompress.plan import REPORT_FILE, Plan
from kvcompress.report.card import CARD_FILE, model_card
from kvcompress.report.healing import read_healing, write_healing
from kvcompress.runtime.head_norm import HEAD_NORM

_SOURCE_CARD = "SOURCE_README.md"


def write_trained(
    directory: Path, plan: Plan, maps: dict[Site, SiteMaps] | None, weights: dict[str, Tensor], target: Path
) -> None:
    """Write the output `directory` into the directory `target`, with these maps and weights in place of its own.

    maps: None leaves them as they are.

    Evaluations of `directory` are left out: they were not measured on this. Raises CheckpointError if a trained
    weight has no place in the checkpoint.
    """
    files = {f.name for f in directory.glob("model*.safetensors")} if weights else set()
    kept = {f.name for f in directory.glob("*.safetensors")} - files - ({MAPS_FILE} if maps is not None else set())
    copy_checkpoint(directory, target, weights=frozenset(kept), skip=frozenset({EVALUATIONS_FILE}))
    if maps is not None:
        save_maps(maps, target / MAPS_FILE)
    if weights:
        _write_weights(directory, dict(weights), sorted(files), target)
    plan.save(target)  # it names the files that it belongs with


def write_record(directory: Path, plan: Plan, stage: dict[str, Any], target: Path) -> None:
    """Write what the training was into `target`: healing.json, report.json and the card."""
    stages = [*read_healing(directory), stage]
    write_healing(target, stages)
    try:
        report = read_json(directory / REPORT_FILE)
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{directory / REPORT_FILE} is damaged ({error}). Compress again.") from error
    (target / REPORT_FILE).write_text(json.dumps(report | {"healing": stages}, indent=1) + "\n", encoding="utf-8")
    card = model_card(plan, directory / _SOURCE_CARD, healing=stages)
    (target / CARD_FILE).write_text(card, encoding="utf-8")


def _write_weights(directory: Path, weights: dict[str, Tensor], files: list[str], target: Path) -> None:
    """Write the weight files one at a time, each tensor in the dtype it had; new norms of heads go into the last."""
    from safetensors.torch import load_file, save_file

    norms = {n: weights.pop(n) for n in list(weights) if f".{HEAD_NORM}." in n}
    for file in files:
        tensors = load_file(directory / file)
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        for name in tensors:
            if name in norms:
                tensors[name] = norms.pop(name).to(tensors[name].dtype)
            elif name in weights:
                tensors[name] = weights.pop(name).to(tensors[name].dtype).contiguous()
        if file == files[-1] and norms:
            tensors |= {name: norm.to(dtype) for name, norm in norms.items()}
            _add_to_index(target, file, sorted(norms))
        save_file(tensors, target / file, metadata={"format": "pt"})
    if weights:
        raise CheckpointError(
            f"{directory} has no tensor {next(iter(weights))}, which was trained: transformers names this model's "
            "weights otherwise than its checkpoint. Train maps or attention."
        )


def _add_to_index(target: Path, file: str, names: list[str]) -> None:
    index = target / "model.safetensors.index.json"
    if index.is_file():
        document = read_json(index)
        document["weight_map"] |= dict.fromkeys(names, file)
        index.write_text(json.dumps(document, indent=2), encoding="utf-8")
