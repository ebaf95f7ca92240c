"""One self-contained HTML page about a compressed model: report.json, its charts and how to run it. No network.

The charts are Vega-Lite's, drawn in the browser as SVG. Vega was chosen over plotly and Bokeh because its whole
library adds 0.9 MB to a page (1.3 and 4.8 MB), its marks carry their values for screen readers and tests, and its
colours may be CSS variables, so that light, dark and print are one drawing. The library comes from the package
vl-convert-python, which bundles it offline (33 MB, so an extra); it is needed to write a page, not to read one.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from kvcompress.errors import OptionError
from kvcompress.report.layer_sections import layers, spectra
from kvcompress.report.markup import Figures
from kvcompress.report.measured_section import measured
from kvcompress.report.search_section import search
from kvcompress.report.sections import cache_sizes, making, overview, running
from kvcompress.report.source import without_local_paths
from kvcompress.report.wording import json_text

_SECTIONS = (overview, cache_sizes, layers, spectra, search, measured, making, running)
_SCRIPTS = ("charts.js", "spectra.js", "page.js")
#: The one name that these need of the library.
_SNIPPET = "window.vegaEmbed = vegaEmbed;"
_ASSETS = files("kvcompress") / "assets" / "report"


def report_page(report: dict[str, Any], evaluations: list[dict[str, Any]], *, name: str) -> str:
    """Return the page. report: a parsed report.json; name: what to call a model that an older report does not name.

    Raises OptionError where the charting library is not installed, KeyError, TypeError or ValueError where the
    report is damaged.
    """
    document = without_local_paths({"report": {"model": name} | report, "evaluations": evaluations})
    figures = Figures(document)
    parts = [section(figures) for section in _SECTIONS]
    return whole_page(f"{document['report']['model']}: compressed KV cache", parts, document, scripts=_SCRIPTS)


def whole_page(title: str, parts: Iterable[str], document: dict[str, Any], *, scripts: Iterable[str]) -> str:
    """Return a page of parts that are HTML already; scripts (of assets/report) find the document in #document.

    Raises OptionError where the charting library is not installed.
    """
    library = charting_library()
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in ("shared.js", *scripts))
    # "<" never stands in the data, so that no text in a report can end the element
    data = json_text(document, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(library, script)}">
<title>{escape(title)}</title>
<style>
{(_ASSETS / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{"".join(parts)}
<script type="application/json" id="document">{data}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def charting_library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script for a page. Raises OptionError if it is not installed."""
    try:
        import vl_convert
    except ImportError as error:
        raise OptionError(
            "the page's charts need the package vl-convert-python. Install it: pip install 'kvcompress[html]'."
        ) from error
    return str(vl_convert.javascript_bundle(snippet=_SNIPPET)).replace("</script", "<\\/script")


def _policy(*scripts: str) -> str:
    """Return a policy by which a browser runs these scripts alone and fetches nothing, whatever a report holds."""
    digests = (b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
