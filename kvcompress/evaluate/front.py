"""Who is on the front: fewer bytes and less loss. Every peer and published method against our default's points."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any, Literal

from kvcompress.report.comparison import name_of

Verdict = Literal["behind", "ahead", "between"]


def verdicts(cells: list[dict[str, Any]], figure: str = "ratio") -> list[dict[str, Any]]:
    """Return a verdict on every measured cell that is not ours, in their order.

    behind: one of ours has no more bytes and no higher figure (the one with the fewest bytes is named);
    ahead: it has fewer bytes and a lower figure than some of ours (all of those are named);
    between: neither, as where it takes more bytes and loses less.
    `clear`, of ahead on the ratio: whether every difference is more than two standard errors of the paired windows.
    """
    measured = [c for c in cells if figure in c]
    ours = sorted((c for c in measured if c["kind"] == "ours"), key=lambda c: c["bytes_per_token"])
    return [_verdict(c, ours, figure) for c in measured if c["kind"] != "ours"]


def _verdict(cell: dict[str, Any], ours: list[dict[str, Any]], figure: str) -> dict[str, Any]:
    size, loss = cell["bytes_per_token"], cell[figure]
    ahead_of = [o for o in ours if size < o["bytes_per_token"] and loss < o[figure]]
    beaten_by = [o for o in ours if o["bytes_per_token"] <= size and o[figure] <= loss]
    verdict: Verdict = "ahead" if ahead_of else "behind" if beaten_by else "between"
    named = ahead_of if ahead_of else beaten_by[:1]
    clear = all(_is_clear(cell, o) for o in ahead_of) if ahead_of and figure == "ratio" else None
    return {
        "method": cell["method"],
        "keep_asked": cell["keep_asked"],
        "verdict": verdict,
        "clear": clear,
        "ours": [{"method": o["method"], "keep_asked": o["keep_asked"]} for o in named],
    }


def _is_clear(a: dict[str, Any], b: dict[str, Any]) -> bool:
    differences = [x - y for x, y in zip(a["log_ratios"], b["log_ratios"], strict=True)]
    if len(differences) < 2:
        return False
    return abs(mean(differences)) > 2 * stdev(differences) / len(differences) ** 0.5


def pareto(cells: list[dict[str, Any]], figure: str = "ratio") -> list[str]:
    """Return the names of the cells that no other beats in both bytes and figure, from the fewest bytes on."""
    front: list[dict[str, Any]] = []
    for cell in sorted((c for c in cells if figure in c), key=lambda c: (c["bytes_per_token"], c[figure])):
        if not front or cell[figure] < front[-1][figure]:
            front.append(cell)
    return [name_of(cell) for cell in front]
