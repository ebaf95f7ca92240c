"""compare.json as it is read back: cells, verdicts and protocol with all that the table and the page show of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from kvcompress.documents import Count, DocumentError, Within, read_json, shaped
from kvcompress.errors import OutputError

COMPARISON_FILE = "compare.json"
FORMAT_VERSION = 1

_Text = Annotated[str, Within(0, 4096)]
_Sizes = Annotated[dict[str, Count], Within(0, 100)]
_Asked = Annotated[float, Within(0, 1)]


class _Original(TypedDict):
    dtype: _Text
    bytes_per_token: Annotated[int, Within(1, 1 << 60)]
    cache_bytes: _Sizes
    perplexity: float | None


class _Protocol(TypedDict):
    text: _Text
    text_sha256: _Text
    seq_len: Count
    windows: Annotated[int, Within(1, 1 << 30)]
    dtype: _Text
    sinks: Count
    recent: Count


class _Request(TypedDict):
    methods: list[_Text]
    keeps: list[_Asked]
    text: _Text
    max_windows: Count | None
    calibration: list[_Text]
    tokens: Count
    seq_len: Count
    sinks: Count
    recent: Count
    seed: Count


class _Machine(TypedDict):
    device: _Text
    torch: _Text
    transformers: _Text
    kvcompress: _Text


class _Named(TypedDict):
    method: _Text
    keep_asked: _Asked | None


class _Cell(_Named):
    key: _Text
    kind: _Text


class _Impossible(_Cell):
    impossible: _Text


class _Measured(_Cell):
    bytes_per_token: Annotated[float, Within(0, 1 << 60)]
    cache_bytes: _Sizes
    keep: float
    ratio: float
    ratio_standard_error: float | None
    kl_nats: float
    top1_agreement: float
    original_perplexity: float
    log_ratios: list[float]


class _Verdict(_Named):
    verdict: Literal["ahead", "behind", "between"]
    clear: NotRequired[bool | None]
    ours: list[_Named]


class _Verdicts(TypedDict):
    ratio: list[_Verdict]
    kl_nats: list[_Verdict]


class _Comparison(TypedDict):
    model: _Text
    architecture: _Text
    original: _Original
    protocol: _Protocol
    request: _Request
    machine: _Machine
    complete: bool
    cells: Annotated[list[_Impossible | _Measured], Within(0, 10_000)]
    verdicts: _Verdicts


def read_comparison(file: Path) -> dict[str, Any]:
    """Return a parsed compare.json. Raises OutputError for a file that is missing or is no comparison."""
    try:
        document: dict[str, Any] = read_json(file, finite=False)  # a perplexity may be infinite
        if document.get("format_version") != FORMAT_VERSION:
            found = document.get("format_version", "none")
            raise DocumentError(f"format version {str(found)[:20]}, this kvcompress has {FORMAT_VERSION}")
        document = shaped(document, _Comparison)
        _check_cells(document)
    except FileNotFoundError as error:
        raise OutputError(f"{file} does not exist: nothing was compared there.") from error
    except (DocumentError, OSError) as error:
        raise OutputError(f"{file} is damaged ({error}). Remove it, or choose another --out.") from error
    return document


def _check_cells(document: dict[str, Any]) -> None:
    """Raise DocumentError where cells cannot be set beside each other and beside the original."""
    lengths = document["original"]["cache_bytes"]
    if not all(n.isascii() and n.isdecimal() and len(n) <= 18 for n in lengths):
        raise DocumentError("original.cache_bytes: a name is no number of tokens")
    for i, cell in enumerate(document["cells"]):
        if "impossible" in cell:
            continue
        if len(cell["log_ratios"]) != document["protocol"]["windows"]:
            raise DocumentError(f"cells[{i}].log_ratios has {len(cell['log_ratios'])} windows")
        if not lengths.keys() <= cell["cache_bytes"].keys():
            raise DocumentError(f"cells[{i}].cache_bytes lacks a length that the original has")
