"""The chart of what measure_scale.py found, light and dark; what the command counts for other sizes is dashed.

    python recipes/draw_scale.py WORK/scale.json --out docs

It needs kvcompress[html]; without files it draws what is counted alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scale_models import SHAPES, imagined

from kvcompress.calibration.memory import least_bytes, whole_bytes

#: Ink, grid, and the colours of models that are held whole, streamed, shared out.
LIGHT = ("#1f2328", "#d8dee4", ["#8c959f", "#0969da", "#bc4c00"])
DARK = ("#e6edf3", "#30363d", ["#8b949e", "#58a6ff", "#f0883e"])

TICKS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
#: What the colours are of, in their order.
HOW = ("whole", "streamed", "several GPUs")


def compared(rows: list[dict[str, Any]]) -> int | None:
    """Return the tokens of which most sizes were measured, -1 where no two sizes have the same."""
    sizes: dict[int | None, set[int]] = {}
    for row in rows:
        sizes.setdefault(row.get("tokens"), set()).add(row["parameters"])
    most = max(sizes, key=lambda tokens: len(sizes[tokens]), default=-1)
    return most if len(sizes.get(most, ())) > 1 else -1


def points(rows: list[dict[str, Any]], seq_len: int) -> list[dict[str, Any]]:
    """Return the points of the chart: memory as the command counts it, and what was measured.

    Seconds are those of one number of tokens, of which several sizes were measured.
    """
    found, tokens = [], compared(rows)
    for shape in (s for name, s in SHAPES.items() if name != "tiny"):
        checkpoint = imagined(shape)
        billions = sum(entry.n_numbers for entry in checkpoint.tensors.values()) / 1e9
        counted = {
            "whole": whole_bytes(checkpoint, "bfloat16", seq_len),
            "streamed": least_bytes(checkpoint, "bfloat16", seq_len),
        }
        for how, n_bytes in counted.items():
            found.append({"billions": billions, "how": how, "kind": "counted", "gigabytes": n_bytes / 1e9})
    for row in rows:
        how = "streamed" if row["streamed"] else "several GPUs" if row["way"] == "gpus" else "whole"
        point = {"billions": row["parameters"] / 1e9, "how": how, "kind": "measured"}
        if "calibration_seconds" in row and row.get("tokens") == tokens:
            point["seconds"] = row["calibration_seconds"]
        if "allocated_bytes" in row and how != "several GPUs":
            point["gigabytes"] = row["allocated_bytes"] / 1e9
        found.append(point)
    return found


def panel(values: list[dict[str, Any]], field: str, title: str, colours: list[str]) -> dict[str, Any]:
    """Return one panel of the chart: a field against billions of parameters, both logarithmic."""
    log = {"type": "quantitative", "scale": {"type": "log"}, "axis": {"values": TICKS, "format": "~g"}}
    x, y = log | {"field": "billions", "title": "parameters, billions"}, log | {"field": field, "title": title}
    domain = [how for how in HOW if any(value["how"] == how for value in values)]
    color = {
        "field": "how",
        "type": "nominal",
        "scale": {"domain": domain, "range": colours},
        "legend": {"title": None, "orient": "top"},
    }
    of = lambda kind: [v for v in values if v["kind"] == kind and field in v]  # noqa: E731
    drawn = [
        {"data": {"values": of("counted")}, "mark": {"type": "line", "strokeDash": [4, 3]}},
        {"data": {"values": of("measured")}, "mark": {"type": "point", "filled": True, "size": 60}},
    ]
    if field == "seconds":  # of which nothing is counted
        drawn.append({"data": {"values": of("measured")}, "mark": {"type": "line", "strokeWidth": 1}})
    return {"width": 300, "height": 240, "layer": drawn, "encoding": {"x": x, "y": y, "color": color}}


def chart(values: list[dict[str, Any]], colours: tuple[str, str, list[str]]) -> dict[str, Any]:
    """Return the drawing of all points in some colours."""
    ink, grid, marks = colours
    panels = [panel(values, "gigabytes", "memory on the device, GB (dashed: counted)", marks)]
    if any("seconds" in value for value in values):
        panels.append(panel(values, "seconds", "calibration, seconds", marks))
    axis = {"labelColor": ink, "titleColor": ink, "gridColor": grid, "domainColor": grid, "tickColor": grid}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "transparent",
        "config": {"view": {"stroke": None}, "axis": axis, "legend": {"labelColor": ink}},
        "hconcat": panels,
    }


def draw(args: argparse.Namespace) -> None:
    """Write scale-light.svg and scale-dark.svg, and print their points."""
    import vl_convert

    rows = [row for file in args.files for row in json.loads(file.read_text(encoding="utf-8"))]
    values = points(rows, args.seq_len)
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        (args.out / f"scale-{name}.svg").write_text(
            vl_convert.vegalite_to_svg(chart(values, colours)), encoding="utf-8"
        )
    for value in values:
        print(json.dumps(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seq-len", type=int, default=2048)
    draw(parser.parse_args())


if __name__ == "__main__":
    main()
