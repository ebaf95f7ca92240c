"""compare.json: what of a comparison is written, and several comparisons on the same windows as one."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from kvcompress import __version__
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import OptionError
from kvcompress.evaluate.front import pareto, verdicts
from kvcompress.evaluate.perplexity import Evaluation
from kvcompress.planning import source_name
from kvcompress.report.stored_comparison import FORMAT_VERSION

#: Context lengths for which the whole cache's bytes are stated.
LENGTHS = (2048, 8192, 32768, 131072)
#: What comparisons that are joined must agree in.
_SHARED = ("format_version", "model_fingerprint", "protocol")
#: By how much the uncompressed perplexities of comparisons on two kinds of device may differ, relatively.
_ROUNDING = 1e-4


def document_of(
    checkpoint: Checkpoint, asked: dict[str, Any], protocol: dict[str, Any], device: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return compare.json but for whether it is complete: what was compared, on what and where, and verdicts on it.

    asked: the request, as JSON. rows: the finished cells.
    """
    spec = checkpoint.spec
    measured = [r for r in rows if "ratio" in r]
    return {
        "format_version": FORMAT_VERSION,
        "model": source_name(checkpoint.source),
        "model_fingerprint": checkpoint.fingerprint(),
        "architecture": spec.architecture,
        "original": {
            "dtype": spec.dtype,
            "bytes_per_token": spec.cache_bytes_per_token,
            "cache_bytes": {str(n): spec.cache_bytes(n) for n in LENGTHS},
            "perplexity": measured[0]["original_perplexity"] if measured else None,
        },
        "protocol": protocol | {name: asked[name] for name in ("sinks", "recent")},
        "request": asked,
        "machine": _machine(device),
        "cells": rows,
        **_judged(rows),
    }


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one comparison of several: of the same model on the same windows, with other methods.

    Every cell is a ratio to the uncompressed model on its own device, so devices may be of several kinds, which are all
    named, where that model's perplexity is the same on them. Raises OptionError where they are not of the same, or
    where a cell is in two of them.
    """
    first = documents[0]
    for other in documents[1:]:
        for name in _SHARED:
            if other[name] != first[name]:
                raise OptionError(f"comparisons with a different {name} cannot be joined: compare in one run.")
    cells = [cell for document in documents for cell in document["cells"]]
    if len({cell["key"] for cell in cells}) < len(cells):
        raise OptionError("comparisons that share a cell cannot be joined.")
    methods = [method for document in documents for method in document["request"]["methods"]]
    perplexities = [d["original"]["perplexity"] for d in documents if d["original"]["perplexity"] is not None]
    perplexity = perplexities[0] if perplexities else None
    return first | {
        "machine": _joined_machine([d["machine"] for d in documents], perplexities),
        "request": first["request"] | {"methods": list(dict.fromkeys(methods))},
        "original": first["original"] | {"perplexity": perplexity},
        "complete": all(document["complete"] for document in documents),
        "cells": cells,
        **_judged(cells),
    }


def _joined_machine(machines: list[dict[str, Any]], perplexities: list[float]) -> dict[str, Any]:
    """Return the machine of joined comparisons, whose device names all of theirs. Raises OptionError; see joined."""
    first = machines[0]
    place = {"device": "", "cpu_count": 0}  # what changes no figure
    if any(machine | place != first | place for machine in machines):
        raise OptionError("comparisons with a different machine cannot be joined: compare in one run.")
    if perplexities and max(perplexities) > min(perplexities) * (1 + _ROUNDING):
        raise OptionError("comparisons whose uncompressed perplexities differ cannot be joined: compare in one run.")
    names = dict.fromkeys(name for machine in machines for name in machine["device"].split(" and "))
    return first | {"device": " and ".join(names)}


def _judged(cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "verdicts": {figure: verdicts(cells, figure) for figure in ("ratio", "kl_nats")},
        "front": {figure: pareto(cells, figure) for figure in ("ratio", "kl_nats")},
    }


def figures_of(result: Evaluation) -> dict[str, Any]:
    """Return what a cell says of an evaluation."""
    return {
        "keep": result.keep,
        "ratio": result.perplexity["ratio"],
        "ratio_standard_error": result.ratio_standard_error,
        "kl_nats": result.kl_nats,
        "top1_agreement": result.top1_agreement,
        "perplexity": result.perplexity["compressed"],
        "original_perplexity": result.perplexity["original"],
        "log_ratios": list(result.log_ratios),
        "sinks": result.protocol["sinks"],
        "recent": result.protocol["recent"],
    }


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    return {
        "device": name,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvcompress": __version__,
    }
