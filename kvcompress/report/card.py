"""The model card (README.md) of a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.checkpoint.writer import atomic_file
from kvcompress.documents import DocumentError, read_text
from kvcompress.errors import OutputError
from kvcompress.plan import Plan
from kvcompress.report.document import CONTEXTS
from kvcompress.report.healing import healing_section
from kvcompress.report.measured import measured_table
from kvcompress.report.source import display_name, hub_id
from kvcompress.report.usage import loading_note, python_usage
from kvcompress.report.wording import nats, percent, size, tokens

CARD_FILE = "README.md"
MOST_CARD_BYTES = 4_000_000

#: What the source's own card says that holds for the compressed model as well.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_BEGIN, _END = "<!-- measured: written by kvcompress eval -->", "<!-- end of measured -->"


def model_card(
    plan: Plan,
    source_card: Path | None = None,
    *,
    repository: str | None = None,
    healing: list[dict[str, Any]] | None = None,
) -> str:
    """Return the card: metadata, what was kept, how it was made, what was measured and how to run it.

    source_card: the source's README.md, whose licence and language hold here too.
    repository: where the output lies on the hub, if it does. healing: its stages of training, see `read_healing`.
    """
    name = display_name(plan.source)
    choices: dict[str, Any] = {"form": plan.form, "maps_only": bool(plan.options.get("maps_only"))}
    return f"""---
{_metadata(plan, source_card)}
---

# {name}, KV cache at {plan.keep:.1%}

The KV cache of {name}, compressed with kvcompress ({plan.form} form): {plan.compressed_bytes_per_token:,} of
{plan.original_bytes_per_token:,} bytes a token remain for tokens older than the exact window
({plan.sinks} sinks, {plan.recent} recent tokens).

| tokens in the cache | original | compressed | share |
|---|---|---|---|
{_sizes(plan)}

## Measured

{measured_section([])}

{healing_section(healing or [])}## Use

`pip install kvcompress`, then:

```python
{python_usage(base=hub_id(plan.source), repository=repository, maps_only=choices["maps_only"])}
```

{loading_note(**choices)}

## Method

{_method(plan)}
"""


def measured_section(evaluations: list[dict[str, Any]]) -> str:
    """Return what was measured, between two comments by which `with_measured` finds it again."""
    table = measured_table(evaluations) or "Nothing was measured yet: `kvcompress eval OUT --text FILE` writes it here."
    return f"{_BEGIN}\n{table}\n{_END}"


def with_measured(card: str, evaluations: list[dict[str, Any]]) -> str:
    """Return a card whose measured section states these evaluations; one without that section stays as it is."""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + measured_section(evaluations) + after if begin and end else card


def is_generated(card: str) -> bool:
    """Return whether a card still has the measured section, which one rewritten by hand has not."""
    return _BEGIN in card and _END in card


def update_card(directory: Path, evaluations: list[dict[str, Any]]) -> None:
    """Write the evaluations into an output's card, where it has one with a measured section. Raises OutputError."""
    file = directory / CARD_FILE
    if not file.is_file():
        return
    try:
        card = read_text(file, most=MOST_CARD_BYTES)
    except (DocumentError, OSError) as error:
        raise OutputError(f"{file} cannot be read ({error}), so that nothing was written into it.") from error
    if (changed := with_measured(card, evaluations)) != card:
        with atomic_file(file) as scratch:
            scratch.write_text(changed, encoding="utf-8")


def _metadata(plan: Plan, source_card: Path | None) -> str:
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = source_metadata(source_card) if source_card else {}
    if base := hub_id(plan.source):
        fields |= {
            "base_model": base,
            "base_model_relation": "adapter" if plan.options.get("maps_only") else "quantized",
        }
    data = ModelCardData(library_name="transformers", tags=["kvcompress", "kv-cache-compression"], **fields)
    return str(data.to_yaml())


def source_metadata(card: Path) -> dict[str, Any]:
    """Return what a source's card says that holds for what is made of it; nothing where it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        read_text(card, most=MOST_CARD_BYTES)
        found = metadata_load(card) or {}
    except Exception:  # a stranger's text: whatever the YAML parser makes of it
        return {}
    return {key: found[key] for key in _INHERITED if _is_plain(found.get(key))}


def _is_plain(value: Any) -> bool:
    """Return whether a stranger's field is a word or a list of some."""
    words = value if isinstance(value, list) else [value]
    return 0 < len(words) <= 100 and all(isinstance(w, str) and 0 < len(w) <= 200 for w in words)


def _sizes(plan: Plan) -> str:
    rows = ((n, plan.original_bytes(n), plan.cache_bytes(n)) for n in CONTEXTS)
    return "\n".join(f"| {tokens(n)} | {size(o)} | {size(c)} | {percent(c / o)} |" for n, o, c in rows)


def _method(plan: Plan) -> str:
    options, calibration = plan.options, plan.calibration
    loss = f"{nats(plan.predicted_loss)} nats a token" if plan.loss_in_nats else "not measured (data-free)"
    texts = ", ".join(Path(s).name for s in calibration.get("sources", [])) or "none (weights only)"
    chosen = {n: options.get(n, "not recorded") for n in ("key_basis", "value_basis", "policy", "metric")}
    return "\n".join(
        [
            f"- Bases: keys `{chosen['key_basis']}`, values `{chosen['value_basis']}`; policy `{chosen['policy']}`.",
            f"- Metric: `{chosen['metric']}`.",
            f"- Calibration text: {texts}; {calibration.get('tokens', 0):,} tokens.",
            f"- Predicted loss (second order): {loss}.",
            f"- Maps: {size(plan.maps_bytes)}, {percent(plan.maps_bytes / max(1, plan.weight_bytes))} of the weights.",
        ]
    )
