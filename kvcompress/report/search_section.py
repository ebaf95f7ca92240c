"""The part of the report page about the search for the smallest cache within a bound (`compress --max-ratio`)."""

from __future__ import annotations

from pathlib import Path

from kvcompress.report.markup import Figures, table


def search(figures: Figures) -> str:
    """Return the budgets that were measured, with the ratio on each kind of text; nothing where none was searched."""
    found = figures.document["report"].get("search")
    if found is None:
        return ""
    place = "report.search"
    steps = sorted(range(len(found["steps"])), key=lambda i: -found["steps"][i]["keep"])
    kinds = list(dict.fromkeys(kind for step in found["steps"] for kind in step["ratios"]))
    rows = []
    for i in steps:
        step = found["steps"][i]
        # by place in the list, because a kind's name may hold dots, which Figures takes for places
        ratios = [f"{step['ratios'][kind]:.4f}" if kind in step["ratios"] else "" for kind in kinds]
        verdict = "chosen" if step["keep"] == found["keep"] else "yes" if step["enough"] else "no"
        rows.append([figures(f"{place}.steps.{i}.keep", "{:.4f}".format), *ratios, verdict])
    columns = ("keep", *(Path(kind).name for kind in kinds), f"<at most {found['max_ratio']:g}")
    return f"""<h2>How small may it be?</h2>
<p>The smallest cache with at most {figures(place + ".max_ratio", "{:g}".format)} times the original's perplexity on \
each kind of text, a standard error included, measured on up to {figures(place + ".windows")} windows of \
{figures(place + ".seq_len")} tokens of each text that were not calibrated on, in {len(steps)} steps.</p>
{table(columns, rows)}
"""
