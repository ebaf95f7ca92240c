"""README.md of an exported checkpoint: what it is, what it costs, how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.plan import Plan

_SERVING = {
    "hf": """```
vllm serve THIS_DIRECTORY
transformers serve THIS_DIRECTORY
python -m sglang.launch_server --model-path THIS_DIRECTORY
```""",
    "vllm-decilm": """```
vllm serve THIS_DIRECTORY --trust-remote-code
```

`--trust-remote-code` loads `configuration_decilm.py`, the config class beside the weights; the model is vLLM's.""",
}


def export_card(plan: Plan, figures: dict[str, Any]) -> str:
    """Return README.md as Markdown with the hub's metadata. figures: ExportResult.to_json()."""
    name = Path(plan.source).name
    cache, weights = figures["cache_bytes_per_token"], figures["weight_bytes"]
    heads = sorted(set(figures["kv_heads_per_layer"]))
    shape = f"{heads[0]}" if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    metadata = ["---", "library_name: transformers", "tags:", "- kvcompress", "- kv-cache-compression"]
    if not Path(plan.source).is_absolute():
        metadata.append(f"base_model: {plan.source}")
    return (
        "\n".join([*metadata, "---", ""])
        + f"""
# {name}, KV cache at {figures["keep"]:.1%}

The KV cache of {name}, folded by kvcompress and written as an ordinary checkpoint: engines run it with no code of
kvcompress. {cache["exported"]:,} of {cache["original"]:,} bytes a token are cached, in {shape} heads of
{figures["head_dim"]} in a layer.

{extra_weights(figures, weights)}

The fold is linear and was not trained: **measure its quality on your text before you serve it**
(`kvcompress eval FOLDED --text FILE` on the folded output that this was made from). Its predicted loss, which
understates large ones, is {plan.predicted_loss:.4f} {"nats a token" if plan.loss_in_nats else "(relative)"}.

{_SERVING[figures["to"]]}
"""
    )


def extra_weights(figures: dict[str, Any], weights: dict[str, int]) -> str:
    """Return a sentence on what the weights grew by and from how many cached tokens that pays."""
    extra = weights["exported"] - weights["original"]
    if extra <= 0:
        return f"The weights take {-extra / 1e6:.2f} MB less than the original's in the same dtype."
    return (
        f"The weights take {extra / 1e6:.2f} MB more than the original's in the same dtype, because query and output "
        f"projections are {figures['virtual_heads_in_a_head']} times as large: it pays from "
        f"{figures['pays_from_cached_tokens']:,} cached tokens on, over all sequences."
    )
