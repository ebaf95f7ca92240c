"""What the fuzzer damages and who reads it then: a function a kind, given a seeded Random and an empty directory."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import kvcompress
from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.text import token_windows
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.task_files import load_task
from kvcompress.evaluate.windows import evaluation_windows
from kvcompress.evaluations import EVALUATIONS_FILE, read_evaluations
from kvcompress.heal.options import HealOptions, load_heal_recipe
from kvcompress.options import CompressOptions, load_recipe
from kvcompress.plan import PLAN_FILE, REPORT_FILE
from kvcompress.planning import make_plan
from kvcompress.publish import repository_contents
from kvcompress.report import page
from kvcompress.report.card import measured_section
from kvcompress.report.comparison import comparison_table
from kvcompress.report.comparison_page import comparison_page
from kvcompress.report.healing import HEALING_FILE, healing_section, read_healing
from kvcompress.report.stored import read_report
from kvcompress.report.stored_comparison import COMPARISON_FILE, read_comparison
from kvcompress.runtime.attach import attach, detach
from kvcompress_cli.report import print_report
from tests.hostile.fuzz_material import OUTPUTS, calibration_options, shared
from tests.hostile.mutations import (
    damaged_bytes,
    damaged_json,
    damaged_place,
    damaged_safetensors,
    replace_file,
)

MAPS_FILE = "kv_maps.safetensors"
_ROOT = Path(__file__).parents[2]


def _copy(name: str, directory: Path, rng: random.Random, *, fingerprints: float = 0.25) -> Path:
    """Return a copy of an output, of hard links; mostly without fingerprints, which hide everything below them."""
    target = directory / "out"
    target.mkdir()
    for file in (shared.root / name).iterdir():
        os.link(file, target / file.name)
    if rng.random() > fingerprints:
        for file, key in ((target / PLAN_FILE, "files"), (target / EVALUATIONS_FILE, "maps")):
            if file.is_file():
                document = json.loads(file.read_text())
                document.pop(key, None)
                replace_file(file, json.dumps(document).encode())
    return target


def _some_output(rng: random.Random) -> str:
    return rng.choice(list(OUTPUTS))


def _use(output: Path, rng: random.Random) -> None:
    """Do with an output what a user does: run it on the model at hand, load it, report it, publish it."""
    what = rng.randrange(6)
    if what < 3:
        try:
            attach(shared.model, output)
            _run(shared.model)
        finally:
            detach(shared.model)
    elif what == 3:
        _run(kvcompress.load(output, base=shared.model_directory))
    elif what == 4:
        _report(output)
    else:
        repository_contents(output, "a/b", base="a/b", everything=rng.random() < 0.5)


def _run(model: Any) -> None:
    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)


def _report(output: Path) -> None:
    report = read_report(output)
    print_report(report)
    evaluations = read_evaluations(output)
    measured_section(evaluations)
    page.report_page(report, evaluations, name="out")


def _json_file(file: Path, rng: random.Random) -> None:
    replace_file(file, _damaged_document(file.read_text(), rng))


def _damaged_document(text: str, rng: random.Random) -> bytes:
    return damaged_bytes(text.encode(), rng) if rng.random() < 0.1 else damaged_json(json.loads(text), rng)


def plan(rng: random.Random, directory: Path) -> None:
    output = _copy(_some_output(rng), directory, rng)
    _json_file(output / PLAN_FILE, rng)
    _use(output, rng)


def maps(rng: random.Random, directory: Path) -> None:
    output = _copy(_some_output(rng), directory, rng)
    replace_file(output / MAPS_FILE, damaged_safetensors((output / MAPS_FILE).read_bytes(), rng))
    _use(output, rng)


def tensors(rng: random.Random, directory: Path) -> None:
    """Whole tensors of the maps: gone, renamed, taken from another site, of other values."""
    output = _copy(_some_output(rng), directory, rng)
    found = load_file(output / MAPS_FILE)
    for _ in range(rng.choice((1, 2))):
        name, other = rng.choice(list(found)), rng.choice(list(found))
        tensor = found[name]
        change = rng.randrange(6)
        if change == 0:
            del found[name]
        elif change == 1:
            found[name] = found[other].clone()
        elif change == 2:
            found[rng.choice((name + "x", "layers.99999.key.bits", "layers.7.key.step", "a", ""))] = tensor.clone()
        elif change == 3:
            found[name] = torch.full_like(tensor, rng.choice((0, 1, 2, 255 if tensor.dtype == torch.uint8 else -1)))
        elif change == 4:
            found[name] = torch.cat([tensor, tensor])[: rng.randrange(2 * len(tensor) + 1)]
        elif tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), 6e4, 1e-38, -0.0))
    replace_file(output / MAPS_FILE, b"")
    save_file({k: t.contiguous().clone() for k, t in found.items()}, output / MAPS_FILE)
    _use(output, rng)


def mixed(rng: random.Random, directory: Path) -> None:
    """Some files of one output, some of others."""
    output = _copy(_some_output(rng), directory, rng, fingerprints=0.5)
    for _ in range(rng.choice((1, 1, 2))):
        source = shared.root / rng.choice((_some_output(rng), f"other-{_some_output(rng)}"))
        name = rng.choice([f.name for f in source.iterdir()])
        replace_file(output / name, (source / name).read_bytes())
    _use(output, rng)


def links(rng: random.Random, directory: Path) -> None:
    """Files that are links, pipes, devices, directories or a gigabyte, or missing."""
    output = _copy(_some_output(rng), directory, rng)
    shutil.rmtree(directory / "outside", ignore_errors=True)
    (directory / "outside").mkdir()
    names = [f.name for f in output.iterdir()]
    name = rng.choice((PLAN_FILE, MAPS_FILE, REPORT_FILE, EVALUATIONS_FILE, "config.json", rng.choice(names), "new"))
    damaged_place(output / name, directory / "outside", rng)
    _use(output, rng)


def weights(rng: random.Random, directory: Path) -> None:
    """The model's own files inside an output."""
    output = _copy(rng.choice(("coded", "folded", "ranks")), directory, rng)
    name = rng.choice(("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"))
    if name == "model.safetensors":
        replace_file(output / name, damaged_safetensors((output / name).read_bytes(), rng))
    else:
        _json_file(output / name, rng)
    if name == "tokenizer.json":
        load_tokenizer(output)
    else:
        kvcompress.load(output)


def report(rng: random.Random, directory: Path) -> None:
    output = _copy(_some_output(rng), directory, rng)
    _json_file(output / rng.choice((REPORT_FILE, REPORT_FILE, EVALUATIONS_FILE)), rng)
    _report(output)


def healing(rng: random.Random, directory: Path) -> None:
    """How an output was trained, and the recipe of a training."""
    if rng.random() < 0.5:
        text = rng.choice(sorted((_ROOT / "recipes" / "heal").glob("*.toml"))).read_bytes()
        (directory / "recipe.toml").write_bytes(_damaged_recipe(text, HealOptions, rng))
        load_heal_recipe(directory / "recipe.toml")
        return
    replace_file(directory / HEALING_FILE, _damaged_document((shared.root / HEALING_FILE).read_text(), rng))
    healing_section(read_healing(directory))


def comparison(rng: random.Random, directory: Path) -> None:
    file = directory / COMPARISON_FILE
    text = (_ROOT / "docs" / "comparison-smollm2" / COMPARISON_FILE).read_text()
    replace_file(file, _damaged_document(text, rng))
    document = read_comparison(file)
    comparison_table(document)
    comparison_page(document)


def checkpoint(rng: random.Random, directory: Path) -> None:
    """A source: its configuration, its index, the headers of its shards."""
    source = _copy("sharded", directory, rng)
    name = rng.choice(
        ("config.json", "model.safetensors.index.json", rng.choice(sorted(source.glob("*.safetensors"))).name)
    )
    if name.endswith(".json"):
        _json_file(source / name, rng)
    else:
        replace_file(source / name, damaged_safetensors((source / name).read_bytes(), rng))
    with open_checkpoint(source) as opened:
        opened.fingerprint()
        for site in opened.spec.sites:
            opened.site_weight(site)


def moments(rng: random.Random, directory: Path) -> None:
    """The moments of an earlier calibration, read again for another budget."""
    file = directory / shared.moments.name
    file.write_bytes(damaged_safetensors(shared.moments.read_bytes(), rng))
    if rng.random() < 0.7:
        Moments.load(file)
        return
    with open_checkpoint(shared.model_directory) as opened:
        found = obtain_moments(opened, directory / "out", calibration_options(), device="cpu")
        make_plan(opened, found, calibration_options())


def task(rng: random.Random, directory: Path) -> None:
    name = f"task{rng.randrange(3)}.jsonl"
    for file in (name, "TASKS.json"):
        shutil.copy(shared.root / file, directory)
    if rng.random() < 0.3:
        _json_file(directory / "TASKS.json", rng)
    else:
        _lines(directory / name, rng)
    for document in (found := load_task(directory / name)).documents:
        found.requests(document)


def answers(rng: random.Random, directory: Path) -> None:
    shutil.copy(shared.root / "answers.jsonl", directory)
    _lines(directory / "answers.jsonl", rng)
    with Answers(directory / "answers.jsonl"):
        pass


def recipe(rng: random.Random, directory: Path) -> None:
    text = rng.choice(sorted((_ROOT / "recipes").glob("*.toml"))).read_bytes()
    (directory / "recipe.toml").write_bytes(_damaged_recipe(text, CompressOptions, rng))
    load_recipe(directory / "recipe.toml")


_ODD_VALUES = (b"[]", b"{}", b'"x"', b"1e400", b"nan", b"true", b"9" * 40, b"-1", b"0.5", b"[[1]]", b"1979-05-27",
               b'"half"')  # fmt: skip


def _damaged_recipe(text: bytes, options: type, rng: random.Random) -> bytes:
    if rng.random() < 0.5:  # a value of another field or kind
        name = rng.choice([f.name for f in fields(options)])
        return b"\n".join([*text.splitlines(), name.encode() + b" = " + rng.choice(_ODD_VALUES)])
    return damaged_bytes(text, rng)


def calibration(rng: random.Random, directory: Path) -> None:
    name = rng.choice(("prose.txt", "log.jsonl", "log.jsonl"))
    shutil.copy(shared.root / name, directory)
    if name == "log.jsonl":
        _lines(directory / name, rng)
    else:
        replace_file(directory / name, damaged_bytes((directory / name).read_bytes(), rng))
    if rng.random() < 0.02:
        with (directory / name).open("ab") as file:
            file.truncate(10**9)
    if rng.random() < 0.5:
        token_windows(shared.tokenizer, str(directory / rng.choice((name, ""))), 2, 16)
    else:
        evaluation_windows(shared.tokenizer, str(directory / name), 16, 2)


def _lines(file: Path, rng: random.Random) -> None:
    """Damage a line by its structure, or the file by its bytes."""
    lines = file.read_bytes().splitlines()
    if rng.random() < 0.3:
        replace_file(file, damaged_bytes(file.read_bytes(), rng))
        return
    i = rng.randrange(len(lines))
    lines[i] = damaged_json(json.loads(lines[i]), rng)
    replace_file(file, b"\n".join(lines) + b"\n")


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    f.__name__: f
    for f in (
        plan, maps, tensors, mixed, links, weights, report, healing, comparison, checkpoint, moments, task, answers,
        recipe, calibration,
    )
}  # fmt: skip
