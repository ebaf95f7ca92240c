"""Figures in words: sizes, context lengths and shares, the same in the terminal, the page and the card; and as JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def size(n_bytes: float) -> str:
    """Return a number of bytes in three or four digits and a decimal unit: 23.04 kB, 3.02 GB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while n_bytes >= 1000 and power < len(units) - 1:
        n_bytes, power = n_bytes / 1000, power + 1
    return f"{n_bytes:.4g} {units[power]}"


def tokens(n: int) -> str:
    """Return a context length as people say it: 2k, 128k, or 1,000."""
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}"


def percent(share: float) -> str:
    """Return a share in percent with three digits at most: 25%, 12.5%, 0.98%."""
    return f"{100 * share:.3g}%"


def nats(loss: float) -> str:
    """Return a loss in nats with four decimals, or two digits where it is smaller than those show: 0.0047, 3.1e-05."""
    return f"{loss:.4f}" if loss == 0 or abs(loss) >= 1e-3 else f"{loss:.1e}"


def json_text(document: Any, **layout: Any) -> str:
    """Return JSON that any reader takes: null where a number is infinite or NaN, for which JSON has no word.

    layout: as of json.dumps.
    """
    return json.dumps(_with_nulls(document), ensure_ascii=False, allow_nan=False, **layout)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
