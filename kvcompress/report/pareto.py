"""A comparison's Pareto figure as a picture of its own (SVG), for a README or a talk; light or dark."""

from __future__ import annotations

from typing import Any

from kvcompress.errors import OptionError

#: Ink, grid, and the colours of ours, published methods and quantised caches.
_LIGHT = ("#1f2328", "#d8dee4", ["#0969da", "#8c959f", "#bc4c00"])
_DARK = ("#e6edf3", "#30363d", ["#58a6ff", "#8b949e", "#f0883e"])
_FAMILIES = {"ours": "kvcompress", "published": "published low-rank methods", "peer": "quantised caches"}
_TICKS = [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10]
#: Whose labels stand below their points, since another's stands above.
_BELOW = ("quanto", "palu", "kvtc-", "fp8")
#: Published methods that are named where they have the fewest bytes; others where they have the most.
_NAMED_LEFT = ("palu", "kq-svd")
#: Variants that differ from their parents by less than a point's size.
_VARIANTS = ("-once", "-unscaled", "-all-layers", "-per-token-head")


def pareto_svg(document: dict[str, Any], *, dark: bool = False) -> str:
    """Return an SVG of KL against bytes a token, one line for each method, of a comparison's document.

    Raises OptionError if the charting library is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise OptionError(
            "a picture needs the package vl-convert-python. Install it: pip install 'kvcompress[html]'."
        ) from error
    return str(vl_convert.vegalite_to_svg(_specification(document, _DARK if dark else _LIGHT)))


def _specification(document: dict[str, Any], colours: tuple[str, str, list[str]]) -> dict[str, Any]:
    ink, grid, families = colours
    original = document["original"]["bytes_per_token"]
    points = [_point(cell, original) for cell in _drawn(document["cells"])]
    for point in points:  # a published method is named once, presets of a quantised cache at both ends of their line
        sizes = [p["left"] for p in points if p["line"] == point["line"]]
        if point["family"] == _FAMILIES["published"]:
            named_at = min(sizes) if point["line"] in _NAMED_LEFT else max(sizes)
            point["label"] = point["line"] if point["left"] == named_at else ""
        elif point["family"] == _FAMILIES["peer"] and min(sizes) < point["left"] < max(sizes):
            point["label"] = ""
    named = list({point["family"]: None for point in points})
    ranges = [families[list(_FAMILIES.values()).index(name)] for name in named]
    x = {
        "field": "left",
        "type": "quantitative",
        "scale": {"type": "log", "domain": [0.04, 1.1], "nice": False},
        "axis": {"values": [0.0625, 0.125, 0.25, 0.5, 1], "format": ".3~p", "title": "cache that is left"},
    }
    y = {
        "field": "kl",
        "type": "quantitative",
        "scale": {"type": "log"},
        "axis": {"values": _TICKS, "format": "~g", "title": "KL to the original, nats a token"},
    }
    color = {"field": "family", "scale": {"domain": named, "range": ranges}, "legend": {"title": None, "orient": "top"}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 620,
        "height": 300,
        "background": "transparent",
        "config": {
            "view": {"stroke": None},
            "axis": {"labelColor": ink, "titleColor": ink, "gridColor": grid, "domainColor": grid, "tickColor": grid},
            "legend": {"labelColor": ink},
        },
        "data": {"values": points},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"x": x, "y": y, "color": color, "detail": {"field": "line"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 70}, "encoding": {"x": x, "y": y, "color": color}},
            *(
                {
                    "transform": [{"filter": {"field": "below", "equal": below}}],
                    "mark": {"type": "text", "align": "left", "dx": 7, "dy": 10 if below else -5, "fontSize": 11},
                    "encoding": {"x": x, "y": y, "color": color, "text": {"field": "label"}},
                }
                for below in (False, True)
            ),
        ],
    }


def _drawn(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the measured cells without those that would lie on another of their own method."""
    drawn: list[dict[str, Any]] = []
    for cell in cells:
        close = any(
            other["method"] == cell["method"] and abs(other["keep"] / cell["keep"] - 1) < 0.03
            for other in drawn
            if "kl_nats" in cell
        )
        if "kl_nats" in cell and not close and not cell["method"].endswith(_VARIANTS):
            drawn.append(cell)
    return drawn


def _point(cell: dict[str, Any], original: float) -> dict[str, Any]:
    quantised = cell["kind"] not in ("ours", "published")
    label = cell["method"] if quantised else f"{cell['keep_asked']:g}"
    return {
        "left": cell["bytes_per_token"] / original,
        "kl": max(cell["kl_nats"], 1e-6),
        "family": _FAMILIES.get(cell["kind"], _FAMILIES["peer"]),
        "line": cell["method"].split("-")[0] if quantised else cell["method"],
        "label": label,
        "below": cell["method"].startswith(_BELOW),
    }
