"""The recipe for calibration text that is recalled: every record comes back, and nothing of it is the evaluation's."""

from __future__ import annotations

import random
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from kvcompress.evaluate import retrieval

RECIPE = Path(__file__).parents[2] / "recipes" / "recall_text.py"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE))


def written(recipe: dict[str, Any], seed: int) -> str:
    rng = random.Random(seed)
    passage = "Somebody walked along the river for a while. " * 8
    text: str = recipe["document"](recipe["Clerk"](rng), lambda: passage, rng, 9000)
    return text


def test_the_same_seed_writes_the_same_text(recipe: dict[str, Any]) -> None:
    assert written(recipe, 3) == written(recipe, 3) != written(recipe, 4)


def test_every_way_of_asking_repeats_what_was_said(recipe: dict[str, Any]) -> None:
    clerk = recipe["Clerk"](random.Random(0))
    assert len(clerk.kinds) == 9
    for make in clerk.kinds:
        first, later = make()
        for again in later:
            told = set(re.findall(r"[\w.-]+", first)) & set(re.findall(r"[\w.-]+", again))
            assert len(told) >= 2, (first, again)


def test_every_record_is_asked_for_later(recipe: dict[str, Any]) -> None:
    text = written(recipe, 5)
    labels = re.findall(r"Invoice ([A-Z]{2}-\d{4}[A-H])", text)
    assert len(labels) > 2 and all(text.count(label) == 2 for label in labels)


def test_nothing_is_as_in_the_prompts_that_are_evaluated(recipe: dict[str, Any]) -> None:
    text = "\n".join(written(recipe, seed) for seed in range(8))
    assert not re.search(r"(?<![0-9a-f])\d{5}(?![0-9a-f])", text)
    assert not re.search("pass ?key|remember|important facts", text, re.IGNORECASE)
    assert not [name for name in retrieval._NAMES if re.search(rf"\b{name}\b", text)]
