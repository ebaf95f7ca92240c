"""The model card: its metadata, what it says, and the measurements that eval writes into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from kvcompress.report.card import CARD_FILE, model_card, update_card, with_measured
from kvcompress.report.source import display_name, hub_id, without_local_paths
from tests.unit.test_plan import plan

MEASURED = {
    "kind": "perplexity",
    "perplexity": {"original": 20.0, "compressed": 20.5, "ratio": 1.025},
    "kl_nats": 0.0123,
    "top1_agreement": 0.955,
    "keep": 0.5,
    "protocol": {"text": "a|b.txt", "text_sha256": "ab" * 32, "seq_len": 2048, "windows": 40, "sinks": 4, "recent": 64}
    | {"dtype": "float32"},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["KV cache at 68.8%", "5.0000 nats a token", "also loads in plain transformers", "kvcompress.load("]),
        ({"form": "folded"}, ["folded form", "needs kvcompress to run", "kvcompress.load("]),
        ({"loss_in_nats": False}, ["not measured (data-free)"]),
        (
            {"options": plan().options | {"maps_only": True}},
            ["kvcompress.attach(model, directory)", 'directory = "OUT"', '"org/model"'],
        ),
        ({"source": "/home/someone/model-7b"}, ["# model-7b, KV cache"]),
    ],
)
def test_what_it_says(changes: dict[str, Any], expected: list[str]) -> None:
    card = model_card(plan(**changes))
    assert all(text in card for text in expected)
    assert "/home/someone" not in card  # a published card does not tell where things lay


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    (tmp_path / "source.md").write_text("---\nlicense: other\nlicense_name: ours\nlanguage: [en, de]\ntags: [x]\n---\n")
    (tmp_path / CARD_FILE).write_text(model_card(plan(), tmp_path / "source.md"))
    assert metadata_load(tmp_path / CARD_FILE) == {
        "library_name": "transformers",
        "tags": ["kvcompress", "kv-cache-compression"],
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "ours",
        "language": ["en", "de"],
    }


def test_maps_alone_are_an_adapter(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(model_card(plan(options=plan().options | {"maps_only": True})))
    assert metadata_load(tmp_path / CARD_FILE)["base_model_relation"] == "adapter"


def test_a_local_source_has_no_base_model(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(model_card(plan(source="/home/someone/model-7b")))
    assert "base_model" not in metadata_load(tmp_path / CARD_FILE)


@pytest.mark.parametrize("text", ["", "no front matter", "---\n[broken\n---\n", "---\n- a list\n---\n"])
def test_a_source_card_that_cannot_be_read_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "source.md").write_text(text)
    assert model_card(plan(), tmp_path / "source.md") == model_card(plan())


def test_python_in_the_card_is_python() -> None:
    for options in ({"maps_only": False}, {"maps_only": True}):
        card = model_card(plan(options=plan().options | options))
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_measurements_appear_and_are_replaced() -> None:
    card = model_card(plan())
    assert "Nothing was measured yet" in card
    once = with_measured(card, [MEASURED])
    assert "Nothing was measured" not in once
    row = r"| **1.0250** | 0.0123 | 95.50% | 20.0000 | 20.5000 | a\|b.txt (sha256 abababababab), 40 windows of 2,048, "
    assert row + "4 sinks, 64 recent, float32 |" in once
    twice = with_measured(once, [MEASURED, MEASURED | {"kl_nats": 0.5}])
    assert twice.count("| **1.0250** |") == 2 and "0.5000" in twice
    assert twice.count("Decode-faithful") == 1
    assert with_measured(twice, []) == card  # nothing else was touched


def test_a_card_without_the_section_stays_as_it_is(tmp_path: Path) -> None:
    update_card(tmp_path, [MEASURED])
    assert not list(tmp_path.iterdir())
    (tmp_path / CARD_FILE).write_text("somebody's own words")
    update_card(tmp_path, [MEASURED])
    assert (tmp_path / CARD_FILE).read_text() == "somebody's own words"


@pytest.mark.parametrize(
    ("source", "name", "hub"),
    [
        ("org/model", "org/model", "org/model"),
        ("/home/someone/model-7b", "model-7b", None),
        ("/x/models--org--a--b/snapshots/0123abc", "org/a--b", "org/a--b"),
        ("/x/model.gguf", "model.gguf", None),
        ("model-7b", "model-7b", None),  # a local name, in an output that was published without a base
    ],
)
def test_names_of_sources(source: str, name: str, hub: str | None) -> None:
    assert display_name(source) == name
    assert hub_id(source) == hub


def test_local_paths_are_shortened_everywhere() -> None:
    document = {"a": ["/home/me/x.txt", {"b": "/home/me/y"}], "c": "builtin:prose", "d": 1.5, "e": None}
    assert without_local_paths(document) == {"a": ["x.txt", {"b": "y"}], "c": "builtin:prose", "d": 1.5, "e": None}
