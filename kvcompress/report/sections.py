"""The parts of the report page: what they say in words and tables. Charts are drawn by assets/report/charts.js."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from kvcompress.report.markup import Figures, code, facts
from kvcompress.report.measured import perplexities
from kvcompress.report.source import hub_id
from kvcompress.report.usage import ORIGINAL, PLACE, loading_note, python_usage, shell_usage
from kvcompress.report.wording import nats, percent, size, tokens


def overview(figures: Figures) -> str:
    """Return the title, what it comes down to, and four figures."""
    report = figures.document["report"]
    per_token = "report.bytes_per_token"
    return f"""<header>
<div>
<p class="kind">Report of a compressed KV cache</p>
<h1>{escape(report["model"])}</h1>
</div>
<button id="theme" type="button">Colours</button>
</header>
<p class="lead">Of the bytes that this model caches for each token, {figures("report.keep", percent)} remain: \
{figures(per_token + ".compressed")} of {figures(per_token + ".original")}. The first \
{figures("report.sinks")} and the latest {figures("report.recent")} tokens stay exact.</p>
<dl class="tiles">
{_tile("Cache that remains", figures("report.keep", percent), f"asked for {figures('report.keep_asked', percent)}")}
{_tile("Predicted loss", *predicted_loss(figures))}
{_tile("Measured perplexity", *_measured_ratio(figures))}
{_tile("Added maps", figures("report.maps.bytes", size), _maps_share(figures))}
</dl>
"""


def cache_sizes(figures: Figures) -> str:
    """Return the sizes of the cache before and after, with bars of the share that remains."""
    items = "".join(_size_bar(figures, i) for i in range(len(figures.value("report.cache_bytes"))))
    return f"""<h2>How large is the cache?</h2>
<ul class="sizes">
{items}</ul>
<p class="note">One sequence, in {escape(figures.value("report.dtype"))}; the grey bar is the original. Counted: the \
compressed form of every token older than the window, {figures("report.sinks")} first and \
{figures("report.recent")} latest tokens exact, and token positions where they are needed. Not counted: the maps, \
which are there once. These are allocated bytes, stated by the plan and measured from the storages by the tests.</p>
"""


def making(figures: Figures) -> str:
    """Return how the output was made: choices, calibration and arithmetic."""
    report = figures.document["report"]
    options, calibration = report["options"], report["calibration"]
    texts = ", ".join(Path(s).name for s in calibration.get("sources", []))
    rows = [
        ("Form", f"{escape(report['form'])}{', maps only' if options.get('maps_only') else ''}"),
        ("Model", f"{escape(report['architecture'])}, {len(report['layers'])} layers, {escape(report['dtype'])}"),
        ("Bases", f"keys <code>{_of(options, 'key_basis')}</code>, values <code>{_of(options, 'value_basis')}</code>"),
        ("Policy", f"<code>{_of(options, 'policy')}</code>"),
        ("Cost of an error", f"<code>{_of(options, 'metric')}</code>"),
        ("Calibration text", escape(texts) or "none: the weights alone"),
    ]
    if texts:
        words = [f"{figures('report.calibration.tokens')} tokens"] if "tokens" in calibration else []
        words += [f"windows of {figures('report.calibration.seq_len')}"] if "seq_len" in calibration else []
        words += [f"{name} {_of(calibration, name)}" for name in ("recent", "seed", "device", "dtype")]
        rows.append(("Calibration", ", ".join(words)))
        digest = str(calibration.get("text_sha256", ""))
        rows.append(("Text digest", f"<code>sha256 {escape(digest[:16])}</code>" if digest else "not recorded"))
    flops = "report.flops_per_cached_token"
    rows += [
        ("Budget left over", f"{figures('report.bytes_left_per_token')} bytes a token"),
        (
            "Arithmetic",
            f"{figures(flops + '.rebuild_keys')} flops to rebuild a cached token's keys, "
            f"{figures(flops + '.attention_on_latent_values')} a query head for its values",
        ),
    ]
    return f"<h2>How it was made</h2>\n{facts(rows)}\n"


def running(figures: Figures) -> str:
    """Return how to load and run the output, and what the page was made from."""
    report = figures.document["report"]
    choices: dict[str, Any] = {"form": report["form"], "maps_only": bool(report["options"].get("maps_only"))}
    base = hub_id(report["model"])
    named = f"<code>{PLACE}</code> is the output's directory"
    if base is None and (choices["maps_only"] or choices["form"] == "folded"):
        named += f", <code>{ORIGINAL}</code> the checkpoint that it was made from"
    return f"""<h2>Load and run it</h2>
<p>{escape(loading_note(**choices))} {named}.</p>
{code(python_usage(base=base, maps_only=choices["maps_only"]))}
<p>Or from the command line:</p>
{code(shell_usage(base=base, **choices))}
<footer>Made by <code>kvcompress report</code>. Every figure on this page comes from the output's \
<code>report.json</code> and <code>evaluations.json</code>, which the page holds; it fetches nothing.\
<noscript> The charts need JavaScript; the tables hold the same figures.</noscript></footer>
"""


def predicted_loss(figures: Figures) -> tuple[str, str]:
    """Return the predicted loss and its unit."""
    if figures.value("report.predicted_loss_nats") is None:
        return "not in nats", "no Fisher information was measured"
    return figures("report.predicted_loss_nats", nats), "nats a token, second order"


def _tile(name: str, big: str, small: str) -> str:
    return f'<div class="tile"><dt>{name}</dt><dd class="big">{big}</dd><dd class="small">{small}</dd></div>'


def _measured_ratio(figures: Figures) -> tuple[str, str]:
    """Return the worst ratio measured with the window that the output was made for."""
    report, evaluations = figures.document["report"], figures.document["evaluations"]
    own = [e for e in perplexities(evaluations) if e["protocol"]["recent"] == report["recent"]]
    if not own:
        return "not yet", "run kvcompress eval"
    worst = evaluations.index(max(own, key=lambda e: e["perplexity"]["ratio"]))
    text = escape(figures.value(f"evaluations.{worst}.protocol.text"))
    which = f"times the original, {text}" if len(own) == 1 else f"times the original, worst of {len(own)}: {text}"
    return figures(f"evaluations.{worst}.perplexity.ratio", "{:.4f}".format), which


def _maps_share(figures: Figures) -> str:
    return f"{figures('report.maps.share_of_weights', percent)} of the weights"


def _size_bar(figures: Figures, i: int) -> str:
    entry = f"report.cache_bytes.{i}"
    share = figures.value(entry + ".compressed") / figures.value(entry + ".original")
    return f"""<li><span class="context">{figures(entry + ".tokens", tokens)} tokens</span>
<span>{figures(entry + ".compressed", size)} of {figures(entry + ".original", size)}, {percent(share)}</span>
<span class="bar"><span style="width:{100 * share:.3f}%"></span></span></li>
"""


def _of(document: dict[str, Any], name: str) -> str:
    return escape(str(document.get(name, "not recorded")))
