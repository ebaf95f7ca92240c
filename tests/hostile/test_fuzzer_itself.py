"""The fuzzer finds what it is there for: a case that raises, hangs, takes memory or the process down has failed."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcompress.errors import CheckpointError
from tests.hostile import fuzz
from tests.hostile.mutations import ODD, damaged_bytes, damaged_json, damaged_safetensors

Case = Callable[[random.Random, Path], None]


def refuse(rng: random.Random, directory: Path) -> None:
    raise CheckpointError("no")


def crash(rng: random.Random, directory: Path) -> None:
    raise KeyError("x")


def spin(rng: random.Random, directory: Path) -> None:
    started = time.process_time()
    while time.process_time() < started + 0.3:
        pass


def sleep(rng: random.Random, directory: Path) -> None:
    time.sleep(60)


def die(rng: random.Random, directory: Path) -> None:
    os._exit(7)


def grow(rng: random.Random, directory: Path) -> None:
    bytearray(1 << 30)[:: 1 << 12] = b"x" * (1 << 18)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lambda *_: None, "success"),
        (refuse, "refused"),
        (crash, "KeyError"),
        (spin, "seconds"),
        (sleep, "hangs"),
        (die, "the process ended"),
        (grow, "GB"),
    ],
    ids=["nothing", "refuse", "crash", "spin", "sleep", "die", "grow"],
)
def test_outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Case, expected: str) -> None:
    from tests.hostile import fuzz_cases

    monkeypatch.setattr(fuzz, "SECONDS", 0.2 if case is spin else 10)
    monkeypatch.setattr(fuzz, "_WALL_SECONDS", 3 if case is sleep else 60)  # the others end by themselves
    used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # its own peak is no child's
    monkeypatch.setattr(fuzz, "BYTES", used + (100 << 20))
    monkeypatch.setattr(fuzz_cases, "KINDS", {"other": lambda *_: None, "case": case})
    found = dict(fuzz.run_batch(["other:0:0", "case:0:1", "other:0:2"], tmp_path))
    assert found["other:0:0"] == found["other:0:2"] == "success"
    assert expected in found["case:0:1"]


def test_damage_is_seeded_and_leaves_the_odd_values_alone() -> None:
    before = repr(ODD)
    document = {"a": [1, {"b": "text"}], "c": 2.5}
    texts = [damaged_json({"a": [1, {"b": "text"}], "c": 2.5}, random.Random(i)) for i in range(300)]
    assert texts == [damaged_json({"a": [1, {"b": "text"}], "c": 2.5}, random.Random(i)) for i in range(300)]
    assert repr(ODD) == before and document == {"a": [1, {"b": "text"}], "c": 2.5}
    assert len(set(texts)) > 200
    data = b"0123456789" * 20
    assert len({damaged_bytes(data, random.Random(i)) for i in range(100)}) > 90


def test_headers_are_damaged_in_every_way(tmp_path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    data = save({"a": torch.arange(8.0), "b": torch.ones(2, 3)})
    outcomes = set()
    for i in range(300):
        try:
            found = load(damaged_safetensors(data, random.Random(i)))
            outcomes.add(str({name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}))
        except (SafetensorError, KeyError):
            outcomes.add("refused")
    assert "refused" in outcomes and len(outcomes) > 10
