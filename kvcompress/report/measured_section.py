"""The part of the report page about what was predicted and what was measured."""

from __future__ import annotations

from html import escape
from typing import Any

from kvcompress.report.markup import Figures, code, swatch, table
from kvcompress.report.measured import distance_words, is_perplexity, protocol_words
from kvcompress.report.measured_tables import tables_of
from kvcompress.report.sections import predicted_loss
from kvcompress.report.usage import PLACE
from kvcompress.report.wording import nats


def measured(figures: Figures) -> str:
    """Return what was predicted and what was measured, with the protocol of each figure."""
    records = list(enumerate(figures.document["evaluations"]))
    command = code(f"kvcompress eval {PLACE} --text FILE\nkvcompress report {PLACE} --html report.html")
    if not records:
        return f"""<h2>Predicted and measured loss</h2>
<p>Predicted: {", ".join(predicted_loss(figures))}. Nothing was measured on this output yet; this writes it here:</p>
{command}"""
    perplexity = [i for i, record in records if is_perplexity(record)]
    others = "".join(_other(record) for _, record in records if not is_perplexity(record))
    return f"""<h2>Predicted and measured loss</h2>
{_perplexities(figures, perplexity) if perplexity else ""}{others}"""


def _perplexities(figures: Figures, indices: list[int]) -> str:
    predicted = figures.value("report.predicted_loss_nats") is not None
    columns = ["", "<text", "ratio", "KL, nats", "same top token", "original", "compressed", "<<protocol"]
    rows = ([str(k + 1), *_cells(figures, f"evaluations.{i}")] for k, i in enumerate(indices))
    line = (
        f"the dashed line is the prediction, {predicted_loss(figures)[0]}, for {figures('report.recent')} recent tokens"
    )
    rule = f"; {line}" if predicted else ""
    return f"""<p>The prediction is made from second moments on the calibration text, so it ranks choices well and \
understates large losses; the measurements are what counts.</p>
<figure>
<div class="legend"><span>{swatch("s0")}KL to the original</span>\
<span>{swatch("s1")}rise of the loss (log of the ratio)</span></div>
<div class="chart" id="chart-measured"></div>
<figcaption>Nats a token{rule}. Decode-faithful: every token attends to the compressed form of all tokens older than \
the window, as in generation. A ratio is the perplexity over the uncompressed model's on the same windows.</figcaption>
</figure>
{table(columns, rows)}
"""


def _cells(figures: Figures, record: str) -> list[str]:
    four = "{:.4f}".format
    return [
        escape(figures.value(record + ".protocol.text")),
        f"<strong>{figures(record + '.perplexity.ratio', four)}</strong>",
        figures(record + ".kl_nats", nats),
        figures(record + ".top1_agreement", "{:.2%}".format),
        figures(record + ".perplexity.original", four),
        figures(record + ".perplexity.compressed", four),
        escape(protocol_words({k: v for k, v in figures.value(record + ".protocol").items() if k != "text"}))
        + escape(distance_words(figures.value(record))),
    ]


def _other(record: dict[str, Any]) -> str:
    """Return a record that this page has no chart for, as tables."""
    parts = (
        f"<h3>{escape(found.title)}</h3>\n{table(found.columns, (map(escape, row) for row in found.rows))}"
        for found in tables_of(record)
    )
    return f"""{"".join(parts)}
<p class="note">{escape(protocol_words(record["protocol"]))}</p>
"""
