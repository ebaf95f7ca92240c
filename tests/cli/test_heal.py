"""`kvcompress heal`: every form from the command line, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcompress.plan import Plan

#: A warning of transformers 5.0, on some file systems.
pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")
FEW = ("--tokens", 1024, "--seq-len", 64, "--batch", 4, "--held-out", 2, "--evaluations", 2, "--maps-rate", 0.02)


def test_every_form_is_healed(kvcompress: Any, any_form: Path, text: Path, tmp_path: Path) -> None:
    outcome = kvcompress("heal", any_form, "-o", tmp_path / "healed", "--text", text, *FEW, "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["output"] == str(tmp_path / "healed")
    assert document["tokens"] == 1024 and document["train"] == "maps"
    assert set(document["texts"]) == {str(text)}
    assert document["protocol"]["windows"] == 2
    assert Plan.load(tmp_path / "healed") == Plan.load(any_form)
    shown = kvcompress("report", tmp_path / "healed").stdout
    assert "1,024 tokens" in shown


def test_what_was_gained_is_shown(kvcompress: Any, compressed: Any, text: Path, tmp_path: Path) -> None:
    directory = compressed(keep=0.0625)
    outcome = kvcompress("heal", directory, "-o", tmp_path / "healed", "--text", text, *FEW)
    assert outcome.code == 0, outcome.stderr
    assert "Trained: the maps" in outcome.stdout and "words.txt" in outcome.stdout
    assert "kvcompress eval" in outcome.stdout


def test_a_recipe_says_how(kvcompress: Any, compressed: Any, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text(f'text = "{text}"\ntokens = 256\nseq_len = 64\nbatch = 4\nheld_out = 2\nevaluations = 1\n')
    outcome = kvcompress("heal", compressed(), "-o", tmp_path / "healed", "--recipe", recipe, "--batch", 2, "--json")
    options = json.loads(outcome.stdout)["options"]
    assert (options["tokens"], options["batch"], options["text"]) == (256, 2, [str(text)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--train", "everything"), "train 'everything' is unknown"),
        (("--train", "all"), "coded form"),
        (("--learning-rate", 1e-3), "Use --maps-rate"),
        (("--batch", 0), "batch must be a whole number"),
        (("--warmup", 2), "warmup must be a number"),
        (("--kl-loss", 0, "--text-loss", 0), "nothing would be trained"),
        (("--device", "cuda:7"), "CUDA_VISIBLE_DEVICES"),
        (("--text", "/nowhere.txt"), "does not exist"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    fails: Any, compressed: Any, text: Path, tmp_path: Path, arguments: tuple[Any, ...], words: str
) -> None:
    given = ("--text", text) if "--text" not in arguments else ()
    assert words in fails("heal", compressed(), "-o", tmp_path / "healed", *given, *FEW, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_pushed_says_no_path_of_the_machine(
    kvcompress: Any, compressed: Any, text: Path, tmp_path: Path
) -> None:
    from kvcompress.publish import repository_contents

    kvcompress("heal", compressed(maps_only=True), "-o", tmp_path / "healed", "--text", text, *FEW)
    contents = repository_contents(tmp_path / "healed", "someone/maps", base="someone/model", everything=False)
    sent = {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in contents.items()}
    record = json.loads(sent["healing.json"])
    assert set(record["stages"][0]["texts"]) == {"words.txt"}
    for name in ("healing.json", "report.json", "README.md"):
        assert b"words.txt" in sent[name] and str(text.parent).encode() not in sent[name], name
