"""docs/models.md from what the survey found: `python -m tests.models.page FINDINGS.jsonl docs/models.md`.

Run by a newer transformers, with `--newer`, what it found of its own types is put at the end of the page.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

_HEAD = """# Models

A model needs no reader: what its attention hands to the cache is compressed, and how keys turn with the position is
proven on the loaded model. This table is written by a run over every causal-LM type of transformers {version}, a small
random model of each with its own pattern of layers, in float32 on a CPU:

    python -m tests.models.survey --jobs 8 --json findings.jsonl
    python -m tests.models.page findings.jsonl docs/models.md

**passes**: at full rank (every site through its codecs) greedy decoding of a left-padded batch, 40 tokens beyond the
window, gives the tokens of the model's own cache; at keep 0.25 the storages are what the plan claims, and `eval` runs.
**refused**: by one line, which is given. **fails**: not run by this version; the reason as seen. **no model**: no small
one could be built from the configuration class. Of {n} types: {counts}.

*Layers*: how many are compressed; the others keep transformers' own cache layer and are counted in every size. *Sites*:
numbers a token of keys + values (of latent attention: the latent + its rotated part). *Reads*: by `attention`, tile by
tile, or `rebuilt` where the model works on what the cache returns before it attends; both store codes alone. Where
every layer that attends has a window, what is in it is compressed. In bfloat16 the same rotations are proven for every
type that passes (`pytest tests/models -k 16_bits`, KVCOMPRESS_MODELS=all) but recurrent_gemma, whose state stays in its
modules from text to text: it is refused there. What compressing others' windows would gain, real
models and quantised weights: [measurements](measurements.md).

"""
_TABLE = """| type | status | layers | sites | rotation | reads | reason |
|---|---|---|---|---|---|---|
"""
_NEWER = """
## transformers {version}

The whole survey once more, with its {n} types: {counts}.

"""
_KINDS = {
    "DynamicSlidingWindowLayer": "window",
    "LinearAttentionLayer": "linear",
    "LinearAttentionAndSlidingWindowAttentionLayer": "window and linear",
    "DummyLayer": "none of its own",
    "DynamicLayer": "unused",
}


def page(findings: list[dict[str, Any]]) -> str:
    """Return the page; later findings of a type replace earlier ones."""
    return _told(_HEAD, findings)


def with_newer(before: str, findings: list[dict[str, Any]]) -> str:
    """Return a page with what was found on this, newer transformers at its end, in place of what was there."""
    return before.split("\n## transformers")[0].rstrip("\n") + "\n" + _told(_NEWER, findings)


def _told(head: str, findings: list[dict[str, Any]]) -> str:
    latest = {f["model_type"]: f for f in findings}
    counts = Counter(f["status"] for f in latest.values())
    order = ("passes", "refused", "fails", "no model")
    told = ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
    rows = [_row(latest[name]) for name in sorted(latest)]
    head = head.format(version=transformers.__version__, n=len(latest), counts=told)
    return head + _TABLE + "\n".join(rows) + "\n"


def _row(finding: dict[str, Any]) -> str:
    layers = dict(finding["layers"])
    compressed = layers.pop("compressed", "")
    own = ", ".join(f"{n} {_KINDS.get(kind, kind)}" for kind, n in layers.items())
    told = f"{compressed}" + (f" (+ {own})" if own else "")
    reason = finding["reason"].replace("|", "/").replace("\n", " ")[:300]
    name, status, sites, rotation, reads = (finding[k] for k in ("model_type", "status", "sites", "rotation", "reads"))
    cells = (name, status, told, sites, rotation, reads, reason)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    is_newer = "--newer" in sys.argv
    source, target = (Path(a) for a in sys.argv[1:] if a != "--newer")
    found = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    whole = with_newer(target.read_text(encoding="utf-8"), found) if is_newer else page(found)
    target.write_text(whole, encoding="utf-8")
