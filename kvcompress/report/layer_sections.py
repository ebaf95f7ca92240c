"""The parts of the report page about layers: heat map, predicted loss, table and spectra (drawn by its scripts)."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from kvcompress.report.markup import Figures, swatch, table
from kvcompress.report.wording import nats

#: Bits stored for each original number at which the heat map's ten colours change: one scale for most outputs, and
#: a finer one for those that have few bits everywhere.
_STEPS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12)
_FINE_STEPS = (0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4)
_PARTS = ("key", "value")
_RELATIVE = "; the numbers are relative, not nats, because no Fisher information was measured"


def layers(figures: Figures) -> str:
    """Return the heat map of bits, the bars of predicted loss, and the table behind them."""
    steps = bit_steps(figures.value("report.layers"))
    ramp = "".join(
        f'<span><i style="background:var(--r{i})"></i><b>{step:g}</b></span>' for i, step in enumerate((0, *steps))
    )
    loss = "" if figures.value("report.predicted_loss_nats") is not None else _RELATIVE
    return f"""<h2>Where the bits go</h2>
<p>Keys and values of every layer share one budget: the stronger the colour, the more is kept of what a layer produces.\
<span class="screen"> Hover or tap for the figures; a click shows the layer's spectra below.</span></p>
<figure>
<div class="chart" id="chart-bits" data-steps="{list(steps)}"></div>
<div class="legend"><span>bits stored for each original number</span><div class="ramp">{ramp}</div></div>
</figure>
<h3>What each layer is predicted to cost</h3>
<figure>
<div class="legend"><span>{swatch("key")}keys</span><span>{swatch("value")}values</span></div>
<div class="chart" id="chart-loss"></div>
<figcaption>Second-order estimate from {_calibration(figures)}{loss}. The bars add up to the predicted loss of the \
whole model.</figcaption>
</figure>
<details><summary>All layers as a table</summary>
{_layer_table(figures)}
</details>
"""


def spectra(figures: Figures) -> str:
    """Return the place of the spectra of chosen layers."""
    unit = "nats a token" if figures.value("report.predicted_loss_nats") is not None else "relative numbers"
    return f"""<h2>Spectra</h2>
<p>Each layer's keys and values are rotated into components; drawn is what it is predicted to cost to drop each one. A \
steep line compresses well. It is solid for as many components as are kept and dotted for the rest; with several \
levels of bits, those that are kept are nearly, not always, the first.</p>
<div class="chosen" id="chosen"><select aria-label="show another layer"><option>show a layer…</option></select></div>
<figure>
<div class="pair">
<div><h3>Keys</h3><div class="chart" id="chart-key-spectra"></div></div>
<div><h3>Values</h3><div class="chart" id="chart-value-spectra"></div></div>
</div>
<figcaption>Cost of dropping a component in {unit}, on a logarithmic axis, measured on {_calibration(figures)}.\
<span class="screen"> Hover or tap for values.</span> Of a long spectrum the first 128 components are drawn, and one \
in every few of the rest.</figcaption>
</figure>
"""


def bit_steps(rows: list[dict[str, Any]]) -> tuple[float, ...]:
    """Return where the heat map's colours change, fine enough to tell the cells of this output apart."""
    most = max(row[part]["bits_per_token"] / row[part]["width"] for row in rows for part in _PARTS)
    return _FINE_STEPS if most <= 5 else _STEPS


def levels(site: dict[str, Any]) -> str:
    """Return how many components are stored with how many bits; older reports tell only the rank."""
    if site["basis"] == "exact":
        return "all exact"
    histogram = site.get("bits_histogram") or {str(site["bits_per_token"] // max(1, site["rank"])): site["rank"]}
    some = [(int(bits), n) for bits, n in histogram.items() if n and int(bits)]
    return ", ".join(f"{n}@{bits}" for bits, n in sorted(some, reverse=True)) or "none"


def _layer_table(figures: Figures) -> str:
    columns = [name for _ in _PARTS for name in ("rank", "bits a token", "<components @ bits", "predicted loss")]
    groups = '<tr><th></th><th colspan="4">keys</th><th colspan="4">values</th></tr>'
    rows = (
        [figures(f"report.layers.{i}.layer"), *(cell for part in _PARTS for cell in _site_cells(figures, i, part))]
        for i in range(len(figures.value("report.layers")))
    )
    return table(["layer", *columns], rows, groups=groups)


def _site_cells(figures: Figures, i: int, part: str) -> list[str]:
    site = f"report.layers.{i}.{part}"
    return [
        f"{figures(site + '.rank')} of {figures(site + '.width')}",
        figures(site + ".bits_per_token"),
        escape(levels(figures.value(site))),
        figures(site + ".predicted_loss", nats),
    ]


def _calibration(figures: Figures) -> str:
    """Return the protocol of everything that was measured before compressing."""
    calibration = figures.value("report.calibration")
    texts = ", ".join(Path(s).name for s in calibration.get("sources", []))
    if not texts:
        return "the weights alone"
    words = f"{figures('report.calibration.tokens')} tokens of {escape(texts)}"
    window = f", in windows of {figures('report.calibration.seq_len')}" if "seq_len" in calibration else ""
    return words + window
