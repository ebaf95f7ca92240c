"""Tables of what `kvcompress eval` recorded: tasks, retrieval, positions, generation, or any other kind by its names.

Cells are plain text, for the page and the card alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """A table of text. A column whose name begins with '<' holds words, any other holds numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def tables_of(record: dict[str, Any]) -> list[MeasuredTable]:
    """Return the tables of a record; one whose shape is not known (of another version) is listed figure by figure."""
    shaped = {"tasks": _tasks, "retrieval": _retrieval, "positions": _positions, "generation": _generation}
    try:
        return shaped.get(record["kind"], _listed)(record)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return _listed(record)


def _tasks(record: dict[str, Any]) -> list[MeasuredTable]:
    """Original and compressed side by side, with standard errors and the paired test."""
    rows = [
        [task["task"], metric["metric"], f"{task['n_documents']:,}", *_sides(metric)]
        for task in record["tasks"]
        for metric in task["metrics"]
        if metric["headline"]
    ]
    if record["average"]:
        n = sum(task["n_documents"] for task in record["tasks"])
        rows.append(["average", "", f"{n:,}", *_sides(record["average"])])
    columns = ("<task", "<metric", "documents", "original", "compressed", "difference", "p")
    return [MeasuredTable("Tasks", columns, rows)]


def _sides(metric: dict[str, Any]) -> list[str]:
    paired = metric["paired"]
    compared = (
        ["", ""] if paired is None else [_error(paired["difference"], paired["stderr"]), f"{paired['p_value']:.2f}"]
    )
    sides = [_error(metric[side], metric[f"{side}_stderr"]) for side in ("original", "compressed")]
    return [*sides, *compared]


def _error(value: float, stderr: float | None) -> str:
    """Return a figure with its standard error: 0.6812 ± 0.0109."""
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _retrieval(record: dict[str, Any]) -> list[MeasuredTable]:
    """For each kind of prompt, the shares found by length and depth."""
    depths = sorted({cell["depth"] for cell in record["cells"]})
    result = []
    for kind in dict.fromkeys(cell["kind"] for cell in record["cells"]):
        cells = {(c["length"], c["depth"]): c for c in record["cells"] if c["kind"] == kind}
        rows = [
            [f"{length:,}", *(_found(cells.get((length, depth))) for depth in depths)]
            for length in sorted({length for length, _ in cells})
        ]
        columns = ("tokens", *(f"depth {depth:g}" for depth in depths))
        result.append(MeasuredTable(f"Retrieval, {kind}: found by the original / compressed", columns, rows))
    return result


def _found(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['original']:.0%} / {cell['compressed']:.0%}"


def _positions(record: dict[str, Any]) -> list[MeasuredTable]:
    """Perplexities by quarter of the context, and how the ratio changes from the first to the last."""
    rows = [
        [
            f"{row['start']:,} to {row['stop'] - 1:,}",
            f"{row['original']:.4f}",
            f"{row['compressed']:.4f}",
            _error(row["ratio"], row["ratio_stderr"]),
        ]
        for row in record["quarters"]
    ]
    growth = _error(record["last_over_first"], record["last_over_first_stderr"])
    rows.append(["last quarter over first", "", "", growth])
    return [MeasuredTable("Perplexity by position", ("<positions", "original", "compressed", "ratio"), rows)]


def _generation(record: dict[str, Any]) -> list[MeasuredTable]:
    """How greedy continuations agree with the original's."""
    rows = [
        ["tokens until the first difference, mean", f"{record['common_prefix']:.1f}"],
        ["tokens until the first difference, median", f"{record['median_prefix']:.1f}"],
        ["continued alike to the end", f"{record['identical']:.1%}"],
        ["same token at the same place", f"{record['same_place']:.1%}"],
        ["same next token, given the original's text", f"{record['next_token']:.1%}"],
    ]
    return [MeasuredTable("Greedy continuations", ("<against the original", "value"), rows)]


def _listed(record: dict[str, Any]) -> list[MeasuredTable]:
    figures = {name: value for name, value in record.items() if name not in ("kind", "protocol")}
    rows = [[name, f"{v:.4g}" if isinstance(v, float) else str(v)] for name, v in _leaves(figures)]
    return [MeasuredTable(str(record["kind"]).replace("_", " ").capitalize(), ("<figure", "value"), rows)]


def _leaves(value: Any, *path: str) -> list[tuple[str, Any]]:
    """Return (dotted name, number or text) of everything in a nested object, lists left out."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, *path, str(key))]
    return [] if isinstance(value, list) or value is None else [(".".join(path), value)]
