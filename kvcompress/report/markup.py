"""Small pieces of HTML: escaped text, tables, lists of facts, and figures that say where in the report they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import Any


class Figures:
    """Figures of a document as <data> elements; each names its place, so that a test can look the value up."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def value(self, path: str) -> Any:
        """Return what stands at a path such as report.layers.3.key.rank. Raises KeyError, IndexError or TypeError."""
        found: Any = self.document
        for name in path.split("."):
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found

    def __call__(self, path: str, shown: Callable[[Any], str] = "{:,}".format) -> str:
        """Return the figure at a path, worded by `shown`."""
        value = self.value(path)
        return f'<data data-path="{escape(path)}" value="{escape(str(value))}">{escape(shown(value))}</data>'


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, groups: str = "") -> str:
    """Return a table of cells that are HTML already.

    columns: names; one that begins with '<' holds text, with '<<' long text, any other holds numbers.
    groups: a first row of the head, for columns that belong together.
    """
    names = list(columns)
    classes = [{0: "", 1: ' class="text"', 2: ' class="text wrap"'}[name[:2].count("<")] for name in names]
    head = "".join(f"<th{c}>{escape(n.lstrip('<'))}</th>" for n, c in zip(names, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead>{groups}<tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and what belongs to them, as HTML already."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>\n" for name, text in rows)
    return f'<dl class="facts">\n{items}</dl>'


def swatch(colour: str) -> str:
    """Return a small square of a colour variable of page.css."""
    return f'<i class="swatch" style="background:var(--{colour})"></i>'


def code(text: str) -> str:
    """Return a block of code."""
    return f"<pre><code>{escape(text)}</code></pre>"
