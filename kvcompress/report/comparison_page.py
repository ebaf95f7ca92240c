"""One self-contained HTML page about a comparison: the Pareto curves, who is ahead of whom, every figure, how measured.

Charts, colours and rules are those of the report page (page.py); assets/report/comparison.js draws.
"""

from __future__ import annotations

from html import escape
from typing import Any

from kvcompress.report.comparison import command, headline, name_of, protocol_lines, verdict_in_words
from kvcompress.report.markup import Figures, code, table
from kvcompress.report.page import whole_page
from kvcompress.report.source import without_local_paths
from kvcompress.report.wording import percent, size, tokens


def comparison_page(comparison: dict[str, Any]) -> str:
    """Return the page of a parsed compare.json. Raises OptionError where the charting library is not installed."""
    document = without_local_paths({"comparison": comparison})
    figures = Figures(document)
    parts = [section(figures) for section in (_overview, _charts, _ahead, _table, _totals, _protocol)]
    title = f"{document['comparison']['model']}: KV caches compared"
    return whole_page(title, parts, document, scripts=("comparison.js",))


def _overview(figures: Figures) -> str:
    comparison = figures.value("comparison")
    original = "comparison.original"
    perplexity = f", perplexity {figures(original + '.perplexity', '{:.4f}'.format)}" if _measured(comparison) else ""
    unfinished = "" if comparison["complete"] else '<p class="lead">Not finished: some cells are still missing.</p>\n'
    return f"""<header>
<div>
<p class="kind">KV caches compared, decode-faithful</p>
<h1>{escape(comparison["model"])}</h1>
</div>
<button id="theme" type="button">Colours</button>
</header>
<p class="lead" id="headline">{escape(headline(comparison))}</p>
{unfinished}<p>Uncompressed: {figures(original + ".bytes_per_token")} bytes of cache a token{perplexity}. \
{figures("comparison.protocol.windows")} windows of {figures("comparison.protocol.seq_len")} tokens of \
{escape(comparison["protocol"]["text"])}.</p>
"""


def _measured(comparison: dict[str, Any]) -> bool:
    return comparison["original"]["perplexity"] is not None


def _charts(figures: Figures) -> str:
    del figures  # the script reads the same document
    return """<h2>What a byte buys</h2>
<p>To the left is smaller, below is better. The grey steps are the Pareto front: what nothing else beats in both.</p>
<figure><h3>Perplexity, relative to the uncompressed model's</h3>
<div class="chart" id="chart-ratio"></div></figure>
<figure><h3>KL divergence to the uncompressed model, nats a token</h3>
<div class="chart" id="chart-kl"></div></figure>
<p class="note">Both axes are logarithmic; the ratio's is linear within 0.001 of 1. Bytes a token are those beyond the
exact window, measured from storages, scales and zeros included. Hover over a point for its figures.</p>
"""


def _ahead(figures: Figures) -> str:
    """Return where others have both fewer bytes and a lower figure than one of our points, for both figures."""
    parts = []
    for figure, said in (("ratio", "a lower ratio"), ("kl_nats", "a lower KL")):
        ahead = [v for v in figures.value(f"comparison.verdicts.{figure}") if v["verdict"] == "ahead"]
        items = "".join(f"<li>{escape(name_of(v))}: {escape(verdict_in_words(v))}</li>\n" for v in ahead)
        body = f"<ul>\n{items}</ul>" if ahead else "<p>None.</p>"
        parts.append(f'<div id="ahead-{figure}"><h3>Fewer bytes and {said}</h3>\n{body}</div>')
    return f'<h2>Where ours is beaten</h2>\n<div class="pair">{"".join(parts)}</div>\n'


def _table(figures: Figures) -> str:
    verdicts = {name_of(v): v for v in figures.value("comparison.verdicts.ratio")}
    rows = []
    for i, cell in enumerate(figures.value("comparison.cells")):
        at, name = f"comparison.cells.{i}", name_of(cell)
        if "impossible" in cell:
            reason = f"<details><summary>not possible</summary>{escape(cell['impossible'])}</details>"
            rows.append([escape(name), *[""] * 6, reason])
            continue
        error = cell["ratio_standard_error"]
        rows.append(
            [
                escape(name),
                figures(f"{at}.bytes_per_token", "{:,.0f}".format),
                figures(f"{at}.keep", percent),
                figures(f"{at}.ratio", "{:.4f}".format),
                "" if error is None else figures(f"{at}.ratio_standard_error", "{:.4f}".format),
                figures(f"{at}.kl_nats", "{:.4f}".format),
                figures(f"{at}.top1_agreement", "{:.1%}".format),
                escape(verdict_in_words(verdicts[name])) if name in verdicts else "",
            ]
        )
    columns = ("<method", "bytes a token", "left", "ratio", "s.e.", "KL, nats", "same top token", "<ratio against ours")
    return f"<h2>Every figure</h2>\n{table(columns, rows)}\n"


def _totals(figures: Figures) -> str:
    lengths = list(figures.value("comparison.original.cache_bytes"))
    rows = [["uncompressed", *(figures(f"comparison.original.cache_bytes.{n}", size) for n in lengths)]]
    for i, cell in enumerate(figures.value("comparison.cells")):
        if "impossible" not in cell:
            sizes = [figures(f"comparison.cells.{i}.cache_bytes.{n}", size) for n in lengths]
            rows.append([escape(name_of(cell)), *sizes])
    shown = table(("<method", *(f"{tokens(int(n))} tokens" for n in lengths)), rows)
    return f"<h2>The whole cache</h2>\n<p>Exact sinks and windows included.</p>\n{shown}\n"


def _protocol(figures: Figures) -> str:
    comparison = figures.value("comparison")
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in protocol_lines(comparison))
    return f"<h2>How it was measured</h2>\n<ul>\n{lines}</ul>\n{code(command(comparison))}\n"
