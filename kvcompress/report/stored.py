"""report.json as it is read back: what the terminal and the page show is there, and a number where it must be one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from kvcompress.documents import Count, DocumentError, Finite, Within, read_json, shaped
from kvcompress.errors import CheckpointError
from kvcompress.plan import PLAN_FILE, REPORT_FILE, Calibration, Options, Plan, no_output
from kvcompress.site_plan import Name, Width

_Some = Annotated[int, Within(1, 1 << 60)]
_Levels = Annotated[dict[str, Count], Within(0, 16)]


class _Site(TypedDict):
    rank: Annotated[int, Within(0, 1 << 20)]
    width: Width
    basis: Name
    bits_per_token: Count
    predicted_loss: Finite
    bits_histogram: NotRequired[_Levels]


class _Row(TypedDict):
    layer: Annotated[int, Within(0, 9999)]
    key: _Site
    value: _Site


class _Bytes(TypedDict):
    original: _Some
    compressed: Count


class _Length(TypedDict):
    tokens: Count
    original: _Some
    compressed: Count


class _Maps(TypedDict):
    bytes: Count
    share_of_weights: Finite


class _Flops(TypedDict):
    rebuild_keys: Count
    attention_on_latent_values: Count


class _Step(TypedDict):
    keep: Finite
    worst: Finite | None
    enough: bool
    ratios: Annotated[dict[str, Finite], Within(0, 100)]
    errors: NotRequired[Annotated[dict[str, Finite], Within(0, 100)]]


class _Search(TypedDict):
    max_ratio: Finite
    keep: Finite
    windows: Count
    seq_len: Count
    seconds: Finite
    steps: Annotated[list[_Step], Within(1, 100)]


class _Report(TypedDict):
    model: NotRequired[Name]
    form: Name
    architecture: Name
    dtype: Name
    keep: Finite
    keep_asked: Finite
    bytes_left_per_token: Annotated[int, Within(-(1 << 60), 1 << 60)]
    bytes_per_token: _Bytes
    predicted_loss_nats: Finite | None
    cache_bytes: Annotated[list[_Length], Within(0, 100)]
    maps: _Maps
    flops_per_cached_token: _Flops
    layers: Annotated[list[_Row], Within(1, 10_000)]
    sinks: Count
    recent: Count
    options: Options
    calibration: Calibration
    energies: NotRequired[dict[str, list[float]]]
    search: NotRequired[_Search]


def read_report(output: Path) -> dict[str, Any]:
    """Return the parsed report.json of a compressed checkpoint.

    Raises CheckpointError if it is missing, damaged, or of another output than the plan beside it.
    """
    file = output / REPORT_FILE
    if not file.is_file():
        raise no_output(output, REPORT_FILE)
    plan = Plan.load(output) if (output / PLAN_FILE).is_file() else None
    try:
        report: dict[str, Any] = shaped(read_json(file), _Report)
        for row in report["layers"]:
            for site in (row["key"], row["value"]):
                for bits in site.get("bits_histogram", {}):
                    if not (bits.isascii() and bits.isdecimal() and len(bits) <= 2):
                        raise DocumentError(f"layers: '{bits[:20]}' is no number of bits")
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Compress again.") from error
    if plan is not None and not _fits(report, plan):
        raise CheckpointError(f"{file} is the report of another output than {PLAN_FILE} beside it. Compress again.")
    return report


def _fits(report: dict[str, Any], plan: Plan) -> bool:
    told = (report["bytes_per_token"]["original"], report["bytes_per_token"]["compressed"], report["form"])
    planned = (plan.original_bytes_per_token, plan.compressed_bytes_per_token, plan.form)
    window = (report["sinks"], report["recent"]) == (plan.sinks, plan.recent)
    loss = plan.predicted_loss if plan.loss_in_nats else None
    return told == planned and window and report["predicted_loss_nats"] == loss
