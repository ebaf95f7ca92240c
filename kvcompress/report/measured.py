"""Recorded evaluations as rows for people: what was measured, and under which protocol."""

from __future__ import annotations

from typing import Any

from kvcompress.report.wording import nats

#: Kinds of records whose figures are known; others are listed figure by figure.
PERPLEXITY = "perplexity"


def perplexities(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of `kvcompress eval --text`."""
    return [e for e in evaluations if e["kind"] == PERPLEXITY]


def protocol_words(protocol: dict[str, Any]) -> str:
    """Return a protocol in one line: what was read, how it was cut, what stayed exact."""
    known = {"text", "text_sha256", "seq_len", "windows", "sinks", "recent", "dtype"}
    words = []
    if "text" in protocol:
        digest = protocol.get("text_sha256", "")
        words.append(protocol["text"] + (f" (sha256 {digest[:12]})" if digest else ""))
    if "windows" in protocol:
        words.append(f"{protocol['windows']} windows of {protocol['seq_len']:,}")
    words += [f"{protocol[name]} {name}" for name in ("sinks", "recent") if name in protocol]
    words += [protocol["dtype"]] if "dtype" in protocol else []
    words += [f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if name not in known]
    return ", ".join(words)


def measured_table(evaluations: list[dict[str, Any]]) -> str:
    """Return Markdown: a table of perplexities, and a list of everything else; empty if nothing was measured."""
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
    parts += [_list(e) for e in evaluations if e["kind"] != PERPLEXITY]
    return "\n\n".join(parts)


def leaves(value: Any, *path: str) -> list[tuple[str, Any]]:
    """Return (dotted name, number or text) of everything in a nested object, lists left out."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, *path, str(key))]
    return [] if isinstance(value, list) or value is None else [(".".join(path), value)]


def other_figures(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the figures of a record of any kind, by name."""
    return leaves({k: v for k, v in record.items() if k not in ("kind", "protocol")})


def _cells(row: dict[str, Any]) -> list[str]:
    perplexity = row["perplexity"]
    return [
        f"**{perplexity['ratio']:.4f}**",
        nats(row["kl_nats"]),
        f"{row['top1_agreement']:.2%}",
        f"{perplexity['original']:.4f}",
        f"{perplexity['compressed']:.4f}",
        protocol_words(row["protocol"]).replace("|", "\\|"),
    ]


def _list(record: dict[str, Any]) -> str:
    lines = [f"**{record['kind']}** ({protocol_words(record['protocol'])})", ""]
    for name, value in other_figures(record):
        lines.append(f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}")
    return "\n".join(lines)
