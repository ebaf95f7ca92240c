"""report.json: what each layer kept, what it costs, and the sizes that a user asks about."""

from __future__ import annotations

from typing import Any

from kvcompress.model.model_spec import Site
from kvcompress.plan import Plan
from kvcompress.report.source import display_name
from kvcompress.site_plan import SitePlan

#: Context lengths at which total cache sizes are stated, sinks and window included.
CONTEXTS = (2048, 8192, 32768, 131072)


def report_document(plan: Plan, spectra: dict[Site, list[float]]) -> dict[str, Any]:
    """Return report.json. Losses are in nats a token where `loss_in_nats` says so; energies have 4 digits."""
    return summary(plan) | {
        "model": display_name(plan.source),
        "layers": layer_rows(plan),
        "sinks": plan.sinks,
        "recent": plan.recent,
        "options": plan.options,
        "calibration": plan.calibration,
        "energies": {str(site): [float(f"{e:.4g}") for e in energy] for site, energy in spectra.items()},
    }


def summary(plan: Plan) -> dict[str, Any]:
    """Return the figures of the whole model."""
    asked = plan.options["keep"]
    original = plan.original_bytes_per_token
    return {
        "form": plan.form,
        "architecture": plan.architecture,
        "dtype": plan.dtype,
        "keep": plan.keep,
        "keep_asked": asked,
        "bytes_left_per_token": int(asked * original) - plan.compressed_bytes_per_token,
        "bytes_per_token": {"original": original, "compressed": plan.compressed_bytes_per_token},
        "predicted_loss_nats": plan.predicted_loss if plan.loss_in_nats else None,
        "cache_bytes": [
            {"tokens": n, "original": plan.original_bytes(n), "compressed": plan.cache_bytes(n)} for n in CONTEXTS
        ],
        "maps": {"bytes": plan.maps_bytes, "share_of_weights": plan.maps_bytes / max(1, plan.weight_bytes)},
        "flops_per_cached_token": {
            "rebuild_keys": rebuild_flops(plan),
            "attention_on_latent_values": value_flops(plan),
        },
    }


def rebuild_flops(plan: Plan) -> int:
    """Return the flops of rebuilding one cached token's keys in all layers; 0 where the decoder is absorbed in q."""
    keys = (s for s in plan.sites if s.part == "key" and not s.exact and not s.rotated and s.turn == 1)
    return sum(2 * s.rank * s.block_width for s in keys)


def value_flops(plan: Plan) -> int:
    """Return the flops, per query head, of weighing one cached token's value latents in all layers."""
    return sum(2 * s.rank for s in plan.sites if s.part == "value")


def layer_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row a layer: {layer, key: {...}, value: {...}}."""
    parts: dict[int, dict[str, Any]] = {}
    for site in plan.sites:
        parts.setdefault(site.layer, {"layer": site.layer})[site.part] = _site_row(site)
    return [parts[layer] for layer in sorted(parts)]


def _site_row(site: SitePlan) -> dict[str, Any]:
    return {
        "rank": site.rank,
        "width": site.width,
        "basis": "exact" if site.exact else site.basis,
        "block_width": site.block_width,
        "bits_histogram": {str(bits): n for bits, n in site.bits},
        "bits_per_token": site.bits_per_token,
        "predicted_loss": site.predicted_loss,
    }
