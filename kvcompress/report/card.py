"""The model card (README.md) of a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path

from kvcompress.plan import Plan
from kvcompress.report.document import CONTEXTS


def model_card(plan: Plan) -> str:
    """Return the card: metadata, what was kept, how it was made and how to run it."""
    name = Path(plan.source).name if Path(plan.source).is_absolute() else plan.source
    options, calibration = plan.options, plan.calibration
    loss = f"{plan.predicted_loss:.4f} nats a token" if plan.loss_in_nats else "not measured (data-free)"
    texts = ", ".join(Path(s).name for s in calibration.get("sources", [])) or "none (weights only)"
    original = plan.original_bytes_per_token
    sizes = "\n".join(
        f"| {n:,} | {n * original / 1e6:,.1f} MB | {plan.cache_bytes(n) / 1e6:,.1f} MB |" for n in CONTEXTS
    )
    metadata = ["---", "library_name: transformers", "tags:", "- kvcompress", "- kv-cache-compression"]
    if not Path(plan.source).is_absolute():
        metadata.append(f"base_model: {plan.source}")
    return (
        "\n".join([*metadata, "---", ""])
        + f"""
# {name}, KV cache at {plan.keep:.1%}

The KV cache of {name}, compressed with kvcompress ({plan.form} form): {plan.compressed_bytes_per_token:,} of
{original:,} bytes a token remain for tokens older than the exact window
({plan.sinks} sinks, {plan.recent} recent tokens).

| tokens in the cache | original | compressed |
|---|---|---|
{sizes}

- Bases: keys `{options["key_basis"]}`, values `{options["value_basis"]}`; policy `{options["policy"]}`.
- Metric: `{options["metric"]}`.
- Calibration text: {texts}; {calibration.get("tokens", 0):,} tokens.
- Predicted loss (second order): {loss}.
- Maps: {plan.maps_bytes / 1e6:.2f} MB, {plan.maps_bytes / max(1, plan.weight_bytes):.1%} of the weights.

```python
import kvcompress

model = kvcompress.load("THIS_DIRECTORY")  # a transformers model; generate() uses the compressed cache
```

{_plain_loading(plan)}
"""
    )


def _plain_loading(plan: Plan) -> str:
    if plan.form == "folded":
        return "Folded weights: k_proj and v_proj are smaller, so it needs kvcompress to run."
    if plan.options["maps_only"]:
        return "This directory holds the maps only: `kvcompress.attach(model, DIRECTORY)` on the original model."
    return "The directory also loads in plain transformers, uncompressed."
