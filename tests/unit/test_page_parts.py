"""The words and tables of the report page that need no browser."""

from __future__ import annotations

from typing import Any

import pytest

from kvcompress.report.layer_sections import bit_steps, levels
from kvcompress.report.markup import Figures, table
from kvcompress.report.usage import python_usage, shell_usage
from kvcompress.report.wording import json_text, nats, percent


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ({"basis": "latent", "rank": 10, "bits_per_token": 46, "bits_histogram": {"1": 4, "8": 2, "4": 5, "2": 0}},
         "2@8, 5@4, 4@1"),
        ({"basis": "latent", "rank": 10, "bits_per_token": 160}, "10@16"),
        ({"basis": "latent", "rank": 0, "bits_per_token": 0}, "none"),
        ({"basis": "latent", "rank": 0, "bits_per_token": 0, "bits_histogram": {}}, "none"),
        ({"basis": "exact", "rank": 16, "bits_per_token": 256, "bits_histogram": {"16": 16}}, "all exact"),
    ],
)  # fmt: skip
def test_levels_in_words(site: dict[str, Any], expected: str) -> None:
    assert levels(site) == expected


def test_the_scale_of_colours_follows_the_bits() -> None:
    def rows(bits: int) -> list[dict[str, Any]]:
        return [{part: {"bits_per_token": n, "width": 8} for part, n in (("key", bits), ("value", 8))}]

    assert max(bit_steps(rows(40))) == 4
    assert max(bit_steps(rows(41))) == 12
    assert len(bit_steps(rows(40))) == len(bit_steps(rows(41))) == 9  # ten colours


def test_json_has_null_for_what_it_has_no_word_for() -> None:
    document = {"ratio": float("inf"), "cells": [(float("nan"), 1.5, None, "é")]}
    assert json_text(document) == '{"ratio": null, "cells": [[null, 1.5, null, "é"]]}'


def test_figures_name_their_place_and_are_escaped() -> None:
    figures = Figures({"a": [{"b": 1234}], "c": "<&>"})
    assert figures("a.0.b") == '<data data-path="a.0.b" value="1234">1,234</data>'
    assert figures("c", str) == '<data data-path="c" value="&lt;&amp;&gt;">&lt;&amp;&gt;</data>'
    with pytest.raises(KeyError):
        figures("a.0.x")


def test_tables_mark_their_columns() -> None:
    html = table(["n", "<name", "<<words"], [["1", "a", "b"]])
    assert '<th>n</th><th class="text">name</th><th class="text wrap">words</th>' in html
    assert '<td>1</td><td class="text">a</td><td class="text wrap">b</td>' in html
    with pytest.raises(ValueError, match="zip"):
        table(["n"], [["1", "2"]])


@pytest.mark.parametrize("form", ["coded", "folded"])
@pytest.mark.parametrize("maps_only", [False, True])
@pytest.mark.parametrize("base", [None, "org/model"])
def test_usage_can_be_pasted(form: str, maps_only: bool, base: str | None) -> None:
    choices = {"form": form, "maps_only": maps_only, "base": base}
    for repository in (None, "me/kv"):
        text = python_usage(maps_only=maps_only, base=base, repository=repository)
        compile(text, "usage", "exec")
        assert ('snapshot_download("me/kv")' in text) == (repository is not None)
        assert ("attach" in text) == maps_only
    commands = shell_usage(**choices)
    # an original without a hub id must be named wherever it is needed: to run maps alone, to compare a folded model
    assert commands.count("--base") == (0 if base else 2 if maps_only else 1 if form == "folded" else 0)


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.0, "0.0000"), (0.00474, "0.0047"), (0.00034, "3.4e-04"), (5, "5.0000")]
)
def test_nats(loss: float, expected: str) -> None:
    assert nats(loss) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.25, "25%"), (0.125, "12.5%"), (0.00862, "0.862%"), (1, "100%")])
def test_percent(share: float, expected: str) -> None:
    assert percent(share) == expected
