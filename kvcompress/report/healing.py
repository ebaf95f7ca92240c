"""healing.json: how an output was trained after its compression, and what that gave; and the same for people.

    {"format_version": 1, "stages": [{"train": ..., "tokens": ..., "protocol": {...}, "texts": {...}}]}

Each stage is one `kvcompress heal`; an output that was healed again keeps the earlier ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from kvcompress.documents import Count, DocumentError, Finite, Within, read_json, shaped
from kvcompress.errors import CheckpointError
from kvcompress.site_plan import Name

HEALING_FILE = "healing.json"
_FORMAT_VERSION = 1
_TRAINED = {
    "maps": "the maps (means, encoders, decoders, steps); the model's weights are as they were",
    "attention": "the attention's projections, the head mixing and the norms",
    "all": "all weights and the head mixing",
}


class _Figures(TypedDict):
    ratio: Finite
    kl_nats: Finite


class _Text(TypedDict):
    before: _Figures
    after: _Figures


class _Protocol(TypedDict):
    windows: Count
    seq_len: Count
    sinks: Count
    recent: Count
    dtype: Name


class _Options(TypedDict):
    head_norm: bool
    kl_loss: Finite
    hidden_loss: Finite
    text_loss: Finite


class _Stage(TypedDict):
    train: Literal["maps", "attention", "all"]
    kept: bool
    tokens: Count
    seconds: Finite
    options: _Options
    protocol: _Protocol
    texts: Annotated[dict[str, _Text], Within(0, 1000)]


class _Healing(TypedDict):
    stages: Annotated[list[_Stage], Within(0, 1000)]


def read_healing(directory: Path) -> list[dict[str, Any]]:
    """Return the stages of training of an output, first one first; none where it was never healed.

    Raises CheckpointError if the file is damaged or of a later format.
    """
    file = directory / HEALING_FILE
    if not file.exists():
        return []
    try:
        document = read_json(file)
        version = document.get("format_version")
        if isinstance(version, int) and version != _FORMAT_VERSION:
            raise CheckpointError(f"{file} has format version {version}; this kvcompress reads {_FORMAT_VERSION}.")
        return list(shaped(document, _Healing)["stages"])
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Heal again.") from error


def write_healing(directory: Path, stages: list[dict[str, Any]]) -> None:
    """Write healing.json: what was trained on an output, the first training first."""
    document = {"format_version": _FORMAT_VERSION, "stages": stages}
    (directory / HEALING_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def healing_words(stage: dict[str, Any]) -> str:
    """Return what was trained, on how much, and whether it was kept, in one sentence."""
    norm = ", with a norm of every head's output" if stage["options"]["head_norm"] else ""
    done = f"Trained: {_TRAINED[stage['train']]}{norm}, on {stage['tokens']:,} tokens in {stage['seconds']:,.0f} s."
    return done if stage["kept"] else f"{done} Nothing was better on every held-out text, so nothing was changed."


def _goal(options: dict[str, Any]) -> str:
    """Return what was trained towards: the losses that had a weight."""
    distilled, by_text = options["kl_loss"] or options["hidden_loss"], options["text_loss"]
    if not distilled:
        return "Trained on the text's own loss"
    return "Distilled from the uncompressed model" + (", with the text's own loss beside it" if by_text else "")


def healing_rows(stage: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return (text, perplexity ratio before and after, KL before and after) of every held-out text."""
    return [
        (
            Path(text).name,
            *(f"{found[when]['ratio']:.4f}" for when in ("before", "after")),
            *(f"{found[when]['kl_nats']:.5f}" for when in ("before", "after")),
        )
        for text, found in stage["texts"].items()
    ]


def healing_section(stages: list[dict[str, Any]]) -> str:
    """Return the model card's section on training, Markdown; empty where there was none."""
    parts = []
    for stage in stages:
        head = "| held-out text | perplexity ratio before | after | KL before, nats | after |\n|---|---|---|---|---|"
        rows = "\n".join(f"| {' | '.join(row)} |" for row in healing_rows(stage))
        p = stage["protocol"]
        how = (
            f"{_goal(stage['options'])}; {p['windows']} held-out windows of {p['seq_len']:,} tokens of "
            f"each text, {p['sinks']} sinks and {p['recent']} recent tokens exact, {p['dtype']}, "
            "none of them trained on."
        )
        parts.append(f"{healing_words(stage)}\n\n{head}\n{rows}\n\n{how}")
    return "## Training after compression\n\n" + "\n\n".join(parts) + "\n\n" if parts else ""
