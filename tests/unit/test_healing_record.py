"""healing.json, its part of the card, what leaves the machine of it, and the windows a training is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress.errors import CalibrationError, CheckpointError, OptionError
from kvcompress.heal.options import HealOptions, load_heal_recipe
from kvcompress.heal.texts import _shares, heal_texts
from kvcompress.report.healing import HEALING_FILE, healing_section, read_healing, write_healing
from tests.tiny_models import build_tokenizer, prose

STAGE: dict[str, Any] = {
    "train": "maps",
    "kept": True,
    "tokens": 12345,
    "seconds": 67.8,
    "options": HealOptions().to_json(),
    "protocol": {"windows": 8, "seq_len": 2048, "sinks": 4, "recent": 64, "dtype": "bfloat16"},
    "texts": {
        "/home/someone/books.txt": {
            "before": {"ratio": 1.0544, "kl_nats": 0.0625},
            "after": {"ratio": 1.0332, "kl_nats": 0.0397},
        }
    },
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_healing(tmp_path) == []
    write_healing(tmp_path, [STAGE])
    assert read_healing(tmp_path) == [STAGE]


def test_the_card_says_that_something_was_trained() -> None:
    section = healing_section([STAGE])
    assert section.startswith("## Training after compression")
    assert "12,345 tokens in 68 s" in section and "weights are as they were" in section
    assert "| books.txt | 1.0544 | 1.0332 | 0.06250 | 0.03970 |" in section
    assert healing_section([]) == ""
    assert "nothing was changed" in healing_section([STAGE | {"kept": False}])


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"text_loss": 0.0}, "Distilled from the uncompressed model; 8 held-out"),
        ({}, "Distilled from the uncompressed model, with the text's own loss beside it;"),
        ({"kl_loss": 0.0, "hidden_loss": 1.0, "text_loss": 0.0}, "Distilled from the uncompressed model;"),
        ({"kl_loss": 0.0, "text_loss": 1.0}, "Trained on the text's own loss;"),
    ],
)
def test_the_card_says_towards_what(losses: dict[str, float], words: str) -> None:
    assert words in healing_section([STAGE | {"options": HealOptions(**losses).to_json()}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format_version": 1}',
        '{"format_version": 1, "stages": [{}]}',
        '{"format_version": 1, "stages": 3}',
        json.dumps({"format_version": 1, "stages": [STAGE | {"train": []}]}),
        json.dumps({"format_version": 1, "stages": [STAGE | {"tokens": 1 << 62}]}),
        json.dumps({"format_version": 1, "stages": [STAGE | {"texts": {"a": {"before": None, "after": {}}}}]}),
        json.dumps({"format_version": 1, "stages": [STAGE | {"protocol": {"windows": 8}}]}),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / HEALING_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"healing\.json is damaged"):
        read_healing(tmp_path)


def test_a_record_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / HEALING_FILE).write_text(json.dumps({"format_version": 2, "stages": []}))
    with pytest.raises(CheckpointError, match="format version 2"):
        read_healing(tmp_path)


@pytest.mark.parametrize(
    ("available", "wanted", "shares"),
    [([10, 10], 8, [4, 4]), ([2, 10], 8, [2, 6]), ([1, 3, 10], 9, [1, 3, 5]), ([2, 2], 9, [2, 2]), ([5, 5], 3, [2, 1])],
)
def test_texts_give_equal_shares_as_far_as_they_reach(available: list[int], wanted: int, shares: list[int]) -> None:
    assert _shares(available, wanted) == shares


def test_held_out_windows_are_no_training_windows_and_stay_the_same(tmp_path: Path) -> None:
    tokenizer, sources = build_tokenizer(), []
    for k in range(2):
        (tmp_path / f"{k}.txt").write_text(prose(12000, seed=k))
        sources.append(str(tmp_path / f"{k}.txt"))
    few, more = (heal_texts(tokenizer, tuple(sources), tokens=n, seq_len=16, held_out=3) for n in (3200 * 2, 4800 * 2))
    assert few.training.shape[1] == 16 and len(few.training) == 400 and len(more.training) == 600
    for source in sources:
        assert few.held_out[source].shape == (3, 16)
        assert torch.equal(few.held_out[source], more.held_out[source])
    held = torch.cat(list(few.held_out.values()))
    assert not (few.training[:, None] == held).all(-1).any()
    assert few.sha256 != more.sha256


def test_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(prose(30))
    with pytest.raises(CalibrationError, match=r"few\.txt has .* windows of 16 tokens, 8 of them"):
        heal_texts(build_tokenizer(), (str(tmp_path / "few.txt"),), tokens=64, seq_len=16, held_out=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "weights"}, "train 'weights' is unknown"),
        ({"text": ()}, "at least one text source"),
        ({"text": ("a", "a")}, "named twice"),
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 1 << 60}, "tokens must be"),
        ({"maps_rate": -1.0}, "maps_rate must be"),
        ({"warmup": 1.0}, "below 1"),
        ({"kl_loss": 0.0, "text_loss": 0.0}, "nothing would be trained"),
        ({"precision": "fp8"}, "precision 'fp8'"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        HealOptions(**changes)


def test_the_recipe_of_maps_names_the_defaults() -> None:
    assert load_heal_recipe(Path(__file__).parents[2] / "recipes" / "heal" / "maps.toml") == HealOptions()


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("epochs = 3\n")
    with pytest.raises(OptionError, match="unknown key 'epochs'"):
        load_heal_recipe(tmp_path / "r.toml")
    with pytest.raises(OptionError, match="does not exist"):
        load_heal_recipe(tmp_path / "none.toml")
    with (tmp_path / "r.toml").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(OptionError, match="1,000,000,000 bytes"):
        load_heal_recipe(tmp_path / "r.toml")
