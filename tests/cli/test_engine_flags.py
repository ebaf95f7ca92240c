"""Flags of vLLM in commands, where vLLM itself is not needed; tests/vllm runs them in the engine."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from kvcompress.bench.engine import EngineTiming, EngineWorkload, reason_of, time_engine, write_random_model
from kvcompress.bench.workload import SHAPES
from kvcompress.errors import OptionError
from kvcompress.runtime.output import read_output
from kvcompress.vllm import plugin
from kvcompress.vllm.pages import PoolBlock


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--engine", "other"),
        ("bench", "OUT", "--engine", "vllm"),
        ("bench", "--engine", "vllm", "--caches", "int3"),
        ("bench", "--engine", "vllm", "--shape", "none"),
        ("bench", "--engine", "vllm", "--caches", "fp8", "--device", "cpu"),
        ("eval", "OUT", "--engine", "other", "--text", "x"),
        ("eval", "OUT", "--engine", "vllm"),
        ("eval", "OUT", "--engine", "vllm", "--text", "x", "--tasks", "y"),
        ("compress", "MODEL", "OUT", "--for", "other"),
        ("compress", "MODEL", "OUT", "--for", "vllm", "--folded"),
    ],
)
def test_what_the_engine_cannot_do_is_said_in_one_line(arguments: tuple[str, ...], fails: Any, tmp_path: Any) -> None:
    assert fails(*(tmp_path / a if a.isupper() else a for a in arguments))


def test_without_vllm_nothing_is_begun(fails: Any, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugin, "version", absent)
    for command in (["bench", "--shape", "tiny"], ["eval", model, "--text", "x"]):
        assert "pip install 'kvcompress[vllm]'" in fails(*command, "--engine", "vllm")


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


def test_where_no_cache_runs_the_command_fails(kvcompress: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugin, "version", lambda _name: "0.32.0")
    monkeypatch.setattr("sys.executable", "/bin/false")
    arguments = ("--shape", "tiny", "--keep", "0.5", "--context", "64", "--batch", "1", "--device", "cpu", "--json")
    outcome = kvcompress("bench", "--engine", "vllm", *arguments)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == "error: none of the caches ran in vLLM: exit 1"
    assert [row["failure"] for row in json.loads(outcome.stdout)["caches"]] == ["exit 1", "exit 1"]


def test_a_cache_that_does_not_run_says_why(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    workload = EngineWorkload(((1, 64),), prompt=64, continuation=8)
    rows = time_engine("tiny", [0.5], workload, caches=["bf16"], turn=256, device="cpu")
    assert [(row.cache, row.keep) for row in rows] == [("bf16", None), ("kvcompress", 0.5)]
    assert all(isinstance(row, EngineTiming) and row.failure for row in rows)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["ValueError: x is odd.", "Search for `cudaErrorUnknown' in https://docs.nvidia.com"],
            "ValueError: x is odd.",
        ),
        (["torch.Error: y", "Exception: WorkerProc failed. See stack trace for root cause."], "torch.Error: y"),
        (["starts", "Killed", ""], "Killed"),
        ([], None),
    ],
)
def test_the_line_that_names_the_error_is_the_reason(lines: list[str], reason: str | None) -> None:
    assert reason_of(f"{line}\n" for line in lines) == reason


def test_random_models_for_the_engine_are_whole_outputs(tmp_path: Any) -> None:
    write_random_model(tmp_path, SHAPES["tiny"], 0.25, 512, turn=256, device="cuda")
    plan, maps = read_output(tmp_path)
    assert len(maps) == 4
    assert plan.dtype == "bfloat16"
    block = PoolBlock.of(plan)
    assert block.n_tokens == 128
    assert block.bytes_per_token >= plan.compressed_bytes_per_token
    assert 0.5 / plan.keep < block.times_the_tokens(65536) <= 1 / plan.keep


def test_a_workload_is_as_long_as_its_longest_sequence() -> None:
    assert EngineWorkload(((8, 1024), (None, 2048)), prompt=2048, continuation=100).length == 2149
    with pytest.raises(OptionError, match="none of vLLM's"):
        time_engine("tiny", [], EngineWorkload(((1, 64),)), caches=["odd"], turn=1)
