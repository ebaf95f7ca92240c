"""Recorded evaluations as rows for people: what was measured, and under which protocol."""

from __future__ import annotations

from typing import Any

from kvcompress.report.measured_tables import tables_of
from kvcompress.report.wording import nats

#: The kind of `kvcompress eval --text`, which the page draws.
PERPLEXITY = "perplexity"


def perplexities(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of `kvcompress eval --text`."""
    return [e for e in evaluations if is_perplexity(e)]


def is_perplexity(record: dict[str, Any]) -> bool:
    """Return whether a record has what the tables and the chart of perplexities show; others are listed."""
    shown, said = {"perplexity", "kl_nats", "top1_agreement"}, {"text", "recent"}
    return record["kind"] == PERPLEXITY and shown <= record.keys() and said <= record["protocol"].keys()


def protocol_words(protocol: dict[str, Any]) -> str:
    """Return a protocol in one line: what was read, how it was cut, what stayed exact."""
    known = {"text", "text_sha256", "seq_len", "windows", "sinks", "recent", "dtype"}
    words = []
    if "text" in protocol:
        digest = protocol.get("text_sha256", "")
        words.append(protocol["text"] + (f" (sha256 {digest[:12]})" if digest else ""))
    if "windows" in protocol and "seq_len" in protocol:
        words.append(f"{protocol['windows']} windows of {protocol['seq_len']:,}")
    words += [f"{protocol[name]} {name}" for name in ("sinks", "recent") if name in protocol]
    words += [protocol["dtype"]] if "dtype" in protocol else []
    for name, value in protocol.items():
        if name not in known and value is not None:
            told = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{name.replace('_', ' ')} {told}")
    return ", ".join(words)


def measured_table(evaluations: list[dict[str, Any]]) -> str:
    """Return Markdown: a table of perplexities, and of everything else; empty if nothing was measured."""
    parts = []
    rows = perplexities(evaluations)
    if rows:
        head = ["perplexity ratio", "KL, nats", "same top token", "original", "compressed", "protocol"]
        table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        table += [f"| {' | '.join(_cells(row))} |" for row in rows]
        parts.append(
            "\n".join(table) + "\n\nDecode-faithful: every token attends to the compressed form of all older "
            "tokens beyond the window."
        )
    parts += [_markdown(e) for e in evaluations if not is_perplexity(e)]
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    perplexity = row["perplexity"]
    return [
        f"**{perplexity['ratio']:.4f}**",
        nats(row["kl_nats"]),
        f"{row['top1_agreement']:.2%}",
        f"{perplexity['original']:.4f}",
        f"{perplexity['compressed']:.4f}",
        _escaped(protocol_words(row["protocol"]) + distance_words(row)),
    ]


def distance_words(record: dict[str, Any]) -> str:
    """Return how far a perplexity's text is from the calibration text, to follow its protocol; empty if not told."""
    told = record.get("distance")
    if not isinstance(told, dict) or not isinstance(told.get("component_energy"), (int, float)):
        return ""
    verdict = " (far)" if told.get("is_far") is True else ""
    return f"; {told['component_energy']:.2f} times the calibration text's energy{verdict}"


def _markdown(record: dict[str, Any]) -> str:
    """Return a record of another kind: its tables, and the protocol below them."""
    parts = []
    for found in tables_of(record):
        rules = ["---" if name.startswith("<") else "---:" for name in found.columns]
        lines = [[name.lstrip("<") for name in found.columns], rules, *found.rows]
        table = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
        parts.append(f"{found.title}:\n\n{table}")
    return "\n\n".join([*parts, f"({protocol_words(record['protocol'])})"])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
