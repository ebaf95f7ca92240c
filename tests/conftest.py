"""Fixtures that all tests share: tiny checkpoints, their moments, and text made in code."""

from __future__ import annotations

import os

# Before anything imports torch or Triton. The ordinary suite runs on the CPU, also where there is a GPU, and Triton's
# kernels in its interpreter; tests/gpu sets the variable to 0 and runs on the GPU.
if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: beside others, threads only wait

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan
from kvcompress.site_plan import SitePlan
from tests.interpreter import mend
from tests.tiny_models import prose, random_ids, save_tiny_checkpoint

mend()
logging.disable_progress_bar()
settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("seeded")
torch.set_num_threads(1)  # the models are so small that threads only cost time


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(family, **config fields): the directory of a tiny seeded model, made once. Never write to it."""
    made: dict[str, Path] = {}

    def make(family: str, seed: int = 0, **changes: Any) -> Path:
        key = repr((family, seed, sorted(changes.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("checkpoint") / family
            made[key] = save_tiny_checkpoint(directory, family, seed, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """tiny_model(family): a freshly loaded model of a tiny checkpoint, in float32 unless told otherwise."""

    def load(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family, **changes), dtype=dtype).eval()

    return load


@pytest.fixture(scope="session")
def tiny_moments(tiny_checkpoint: Callable[..., Path], tiny_model: Callable[..., Any]) -> Callable[..., Moments]:
    """tiny_moments(family): measured moments of a tiny model on random tokens, taken once."""
    taken: dict[str, Moments] = {}

    def measure(family: str) -> Moments:
        if family not in taken:
            with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
                moments = empty_moments(checkpoint.spec, {"mode": "fisher"}, group=checkpoint.spec.layers[0].n_kv_heads)
                windows = random_ids(12, 48, seed=7)
                taken[family] = collect_moments(
                    tiny_model(family), checkpoint.spec, windows, moments, sinks=2, recent=0, seed=0
                )
        return taken[family]

    return measure


@pytest.fixture(scope="session")
def tiny_plan(tiny_checkpoint: Callable[..., Path], tiny_moments: Callable[..., Moments]) -> Callable[..., Any]:
    """tiny_plan(family, **options): (plan, maps) of make_plan on the moments of tiny_moments, made once."""
    made: dict[Any, Any] = {}

    def make(family: str, **options: Any) -> Any:
        chosen = CompressOptions(**options)
        if (family, chosen) not in made:
            with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
                made[family, chosen] = make_plan(checkpoint, tiny_moments(family), chosen)[:2]
        return made[family, chosen]

    return make


@pytest.fixture
def never_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sites that keep every component go through their codecs, instead of being stored as they are."""
    monkeypatch.setattr(SitePlan, "exact", property(lambda self: False))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 9,000 tokens of the tiny tokenizer."""
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(prose(4000, seed=1), encoding="utf-8")
    return file


@pytest.fixture
def no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse batches to torch.linalg.solve, in which several threads of a CPU wait for each other for ever."""
    solve = torch.linalg.solve

    def alone(matrix: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        assert matrix.dim() == 2
        return solve(matrix, wanted)

    monkeypatch.setattr(torch.linalg, "solve", alone)
