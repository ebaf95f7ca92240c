"""Tables of recorded evaluations, in the card and on the page."""

from __future__ import annotations

from typing import Any

from kvcompress.report.card import measured_section
from kvcompress.report.measured_tables import tables_of

PROTOCOL = {"sinks": 4, "recent": 64, "dtype": "float32", "limit": None, "lengths": [1024, 2048]}


def metric(name: str, original: float, compressed: float, **changes: Any) -> dict[str, Any]:
    paired = {"difference": compressed - original, "stderr": 0.004, "p_value": 0.25, "test": "mcnemar"}
    errors = {"original_stderr": 0.0109, "compressed_stderr": 0.011}
    sides = {"metric": name, "original": original, "compressed": compressed, **errors}
    return sides | {"paired": paired, "higher_is_better": True, "headline": True} | changes


def test_tasks_side_by_side() -> None:
    metrics = [metric("acc", 0.68, 0.675), metric("acc_norm", 0.1, 0.2, headline=False)]
    other = [metric("perplexity", 12.5, 12.75, original_stderr=None, paired=None)]
    tasks = [
        {"task": "piqa", "n_documents": 1838, "n_fewshot": 0, "metrics": metrics},
        {"task": "a|b", "n_documents": 10, "n_fewshot": 0, "metrics": other},
    ]
    record = {"kind": "tasks", "tasks": tasks, "average": metric("average", 0.5, 0.49), "protocol": PROTOCOL}
    (table,) = tables_of(record)
    assert table.rows == [
        ["piqa", "acc", "1,838", "0.6800 ± 0.0109", "0.6750 ± 0.0110", "-0.0050 ± 0.0040", "0.25"],
        ["a|b", "perplexity", "10", "12.5000", "12.7500 ± 0.0110", "", ""],
        ["average", "", "1,848", "0.5000 ± 0.0109", "0.4900 ± 0.0110", "-0.0100 ± 0.0040", "0.25"],
    ]
    card = measured_section([record])
    assert r"| a\|b | perplexity | 10 | 12.5000 |" in card
    assert "(4 sinks, 64 recent, float32, lengths 1024 2048)" in card
    assert "---: |" in card


def test_retrieval_by_length_and_depth() -> None:
    cells = [
        {"kind": kind, "length": length, "depth": depth, "n": 10, "original": 1.0, "compressed": depth}
        for kind in ("passkey", "multikey")
        for length in (2048, 1024)
        for depth in (0.5, 0.25)
    ]
    passkey, multikey = tables_of({"kind": "retrieval", "cells": cells, "protocol": PROTOCOL})
    assert "passkey" in passkey.title and "multikey" in multikey.title
    assert passkey.columns == ("tokens", "depth 0.25", "depth 0.5")
    assert passkey.rows == [["1,024", "100% / 25%", "100% / 50%"], ["2,048", "100% / 25%", "100% / 50%"]]


def test_positions_by_quarter() -> None:
    quarter = {"start": 0, "stop": 2048, "original": 20.0, "compressed": 20.5, "ratio": 1.025, "ratio_stderr": 0.003}
    record = {"kind": "positions", "quarters": [quarter], "last_over_first": 1.001, "last_over_first_stderr": None}
    (table,) = tables_of(record | {"protocol": PROTOCOL})
    assert table.rows == [
        ["0 to 2,047", "20.0000", "20.5000", "1.0250 ± 0.0030"],
        ["last quarter over first", "", "", "1.0010"],
    ]


def test_generation_in_words() -> None:
    figures = {"common_prefix": 61.25, "median_prefix": 50.0, "identical": 0.125, "same_place": 0.5, "next_token": 0.97}
    (table,) = tables_of({"kind": "generation", **figures, "protocol": PROTOCOL})
    assert [row[1] for row in table.rows] == ["61.2", "50.0", "12.5%", "50.0%", "97.0%"]


def test_what_is_not_known_is_listed() -> None:
    record = {
        "kind": "odd_one",
        "protocol": {"shots": 0},
        "piqa": {"original": 0.71234, "n": 3},
        "rows": [1],
        "x": None,
    }
    (table,) = tables_of(record)
    assert table.title == "Odd one"
    assert table.rows == [["piqa.original", "0.7123"], ["piqa.n", "3"]]
    (other_version,) = tables_of({"kind": "tasks", "protocol": {}, "score": 0.5})
    assert other_version.rows == [["score", "0.5"]]
    assert "(shots 0)" in measured_section([record])


def test_a_far_text_is_said_to_be_far() -> None:
    perplexity = {"ratio": 1.25, "original": 10.0, "compressed": 12.5}
    record = {"kind": "perplexity", "perplexity": perplexity, "kl_nats": 0.2, "top1_agreement": 0.9}
    record |= {"protocol": PROTOCOL | {"text": "poems.txt"}}
    assert "energy" not in measured_section([record])
    distance = {"component_energy": 2.5, "gains_at_ends": 0.2, "is_far": True}
    assert "; 2.50 times the calibration text's energy (far) |" in measured_section([record | {"distance": distance}])
    assert "(far)" not in measured_section([record | {"distance": distance | {"is_far": False}}])
    assert "energy" not in measured_section([record | {"distance": "damaged"}])
