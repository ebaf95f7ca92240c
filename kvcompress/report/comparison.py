"""A comparison in words: the rows of its table, Markdown, and what must be said of every figure."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

from kvcompress.report.source import without_local_paths


class Row(NamedTuple):
    """A cell of a comparison, worded."""

    method: str
    bytes_per_token: str
    left: str
    ratio: str
    error: str
    kl: str
    verdict: str


def name_of(cell: dict[str, Any]) -> str:
    """Return what to call a cell: default at 0.25, hqq-4bit."""
    return str(cell["method"]) if cell["keep_asked"] is None else f"{cell['method']} at {cell['keep_asked']:g}"


def rows(document: dict[str, Any]) -> list[Row]:
    """Return a comparison's cells, worded, in the order in which they were asked for."""
    said = {name_of(v): v for v in document["verdicts"]["ratio"]}
    found = []
    for cell in document["cells"]:
        if "impossible" in cell:
            found.append(Row(name_of(cell), "", "", "", "", "", "not possible"))
            continue
        error = cell["ratio_standard_error"]
        found.append(
            Row(
                name_of(cell),
                f"{cell['bytes_per_token']:,.0f}",
                f"{cell['keep']:.1%}",
                f"{cell['ratio']:.4f}",
                "" if error is None else f"{error:.4f}",
                f"{cell['kl_nats']:.4f}",
                verdict_in_words(said[name_of(cell)]) if name_of(cell) in said else "",
            )
        )
    return found


def verdict_in_words(verdict: dict[str, Any]) -> str:
    """Return how a peer or published method stands against our points."""
    ours = ", ".join(name_of(o) for o in verdict["ours"])
    if verdict["verdict"] == "ahead":
        return f"AHEAD of {ours}{_doubt(verdict)}"
    return f"behind {ours}" if verdict["verdict"] == "behind" else "neither"


def _doubt(verdict: dict[str, Any]) -> str:
    return " (within the noise)" if verdict["clear"] is False else ""


def headline(document: dict[str, Any]) -> str:
    """Return the one sentence that the comparison comes to."""
    ahead = [v for v in document["verdicts"]["ratio"] if v["verdict"] == "ahead"]
    if ahead:
        found = "; ".join(f"{name_of(v)} against {', '.join(name_of(o) for o in v['ours'])}{_doubt(v)}" for v in ahead)
        by_kl = any(v["verdict"] == "ahead" for v in document["verdicts"]["kl_nats"])
        rest = "" if by_kl else " Nothing has both fewer bytes and a lower KL."
        return f"Not everywhere on the front: fewer bytes and a lower ratio than ours has {found}.{rest}"
    if not document["verdicts"]["ratio"]:
        return "Nothing to compare with: only our own method was measured."
    return "Nothing here has both fewer bytes and a lower ratio than one of our points."


def protocol_lines(document: dict[str, Any]) -> list[str]:
    """Return how the figures were measured, a sentence each."""
    protocol, machine, original = document["protocol"], document["machine"], document["original"]
    sources = ", ".join(document["request"]["calibration"]) or "the default"
    return [
        f"Model {document['model']} ({document['architecture']}, {original['dtype']}, {original['bytes_per_token']:,} "
        f"bytes of cache a token), run in {protocol['dtype']} on {machine['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, kvcompress {machine['kvcompress']}.",
        f"Text {protocol['text']} (sha256 {protocol['text_sha256'][:12]}), {protocol['windows']} windows of "
        f"{protocol['seq_len']} tokens, each by itself.",
        "Decode-faithful: every token attends to the compressed form of all tokens that are older than the exact "
        f"window. Ours: {protocol['sinks']} sinks and {protocol['recent']} recent tokens exact. hqq and quanto: "
        "transformers' own layers, groups of 64, residual window 128; all tokens are quantised anew whenever that is "
        "full, as transformers does, or (once) each token a single time. kivi: after arXiv 2402.02750, groups of 32, "
        "128 to 159 tokens exact. fp8: e4m3 with a scale for each tensor, or unscaled. turboquant, ultraquant, "
        "per-token-head: vLLM's formats, every token coded as it comes. kvtc-deflate: bytes at rest, no live cache.",
        "Bytes a token are those beyond the window, from the storages of a filled cache, scales and zeros included. "
        "Peers store in the checkpoint's dtype. xkv's singular vectors belong to a text: they are counted, shared out "
        "among its tokens; its budget is what its latents take.",
        f"Our methods and the published ones were calibrated on {sources}.",
        "Ratio: perplexity over the uncompressed model's; its standard error is over the windows. KL in nats a token.",
        "Behind: one of our points has no more bytes and no higher ratio. AHEAD: fewer bytes and a lower ratio than "
        "one of ours; within the noise where paired windows do not tell them apart by two standard errors. Neither: it "
        "trades bytes for loss.",
    ]


def command(document: dict[str, Any]) -> str:
    """Return the command that makes this comparison."""
    asked, dtype = document["request"], document["protocol"]["dtype"]
    words = ["kvcompress", "compare", str(document["model"]), "--keep", ",".join(f"{k:g}" for k in asked["keeps"])]
    words += ["--methods", ",".join(asked["methods"]), "--text", asked["text"]]
    for text in asked["calibration"]:
        words += ["--calibration", text]
    for name in ("tokens", "seq_len", "max_windows", "sinks", "recent", "seed"):
        if asked[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(asked[name])]
    return shlex.join([*words, "--dtype", dtype])


def impossible_lines(document: dict[str, Any]) -> list[str]:
    """Return which cells are not possible and why: a paragraph for each reason, after an empty line."""
    cells = [cell for cell in document["cells"] if "impossible" in cell]
    lines = []
    for reason in dict.fromkeys(cell["impossible"] for cell in cells):
        names = ", ".join(name_of(cell) for cell in cells if cell["impossible"] == reason)
        lines += ["", f"Not possible: {names}: {reason}"]
    return lines


def comparison_table(document: dict[str, Any]) -> str:
    """Return the comparison as Markdown: headline, table, protocol."""
    document = without_local_paths(document)
    names = ("method", "bytes a token", "left", "ratio", "s.e.", "KL", "against ours")
    unfinished = [] if document["complete"] else ["", "Not finished: some cells are still missing."]
    lines = [headline(document), *unfinished, "", f"| {' | '.join(names)} |", "|---|" + "---:|" * 5 + "---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(document)]
    perplexity = document["original"]["perplexity"]
    lines += impossible_lines(document)
    if perplexity is not None:
        lines += ["", f"Uncompressed: {document['original']['bytes_per_token']:,} bytes, perplexity {perplexity:.4f}."]
    return (
        "\n".join([*lines, "", *(f"- {line}" for line in protocol_lines(document)), "", f"    {command(document)}"])
        + "\n"
    )
