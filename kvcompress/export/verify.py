"""Running an export in every engine that is installed, each in its own process, against the folded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcompress.calibration.text import PROSE, documents
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.compat import cache_argument, cache_of
from kvcompress.errors import CalibrationError, OptionError, OutputError
from kvcompress.export.export import ExportResult
from kvcompress.runtime.load import load

#: Target -> the engines that take it, as the modules they are imported as.
ENGINES = {"hf": ("transformers", "vllm"), "gguf": ("llama_cpp",), "vllm-decilm": ("vllm",)}
#: Largest difference of a logit in fp32 arithmetic: summation order only; llama.cpp's kernels are rougher.
LOGIT_LIMITS = {"transformers": 1e-3, "vllm": 1e-3, "llama_cpp": 5e-3}
_N_POSITIONS, _N_GENERATE, _N_PROMPT = 512, 64, 64
#: llama.cpp reports its cache in hundredths of a MiB.
_CACHE_TOLERANCE = 0.02
_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class EngineCheck:
    """How an engine's run of the export compares with the folded model in transformers, both in float32.

    same_tokens: how many greedy tokens agree before the first that does not. bytes_per_token is what the engine
    reports for its float32 cache, `claimed` what the export claims for that. passed is None where weights were
    rounded, so that differences say nothing about the export. error: why the engine did not run.
    """

    engine: str
    version: str
    max_logit_difference: float
    same_tokens: int
    n_positions: int
    n_generate: int
    bytes_per_token: float
    claimed: int
    said: str
    #: Whether the engine's own tokenizer cuts the text into the same tokens; None where it has none of its own.
    same_tokenization: bool | None
    passed: bool | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    directory: str | Path, result: ExportResult, *, text: str = PROSE, pythons: Sequence[str] = ()
) -> tuple[list[EngineCheck], list[str]]:
    """Return (a check for each engine found, the engines that are not installed).

    directory: the folded output that was exported. pythons: interpreters of other environments to look for engines
    in, besides this one; an engine's process imports nothing of kvcompress. Raises OptionError for a Python that
    does not run, CalibrationError for too little text.
    """
    found = find_engines(result.target, pythons)
    missing = [name for name in ENGINES[result.target] if name not in found]
    if not found:
        return [], missing
    model = load(directory, dtype=torch.float32)
    n_positions = min(_N_POSITIONS, model.config.max_position_embeddings - _N_GENERATE)
    ids, sample = text_ids(Path(directory), text, n_positions)
    logits, tokens = folded_run(model, ids[:n_positions])
    request = {
        "model": str(result.output.absolute()),
        "ids": ids[:n_positions],
        "all_ids": ids,
        "text": sample,
        "n_prompt": _N_PROMPT,
        "n_generate": _N_GENERATE,
    }
    return [_check(name, python, request, logits, tokens, result) for name, python in found.items()], missing


def find_engines(target: str, pythons: Sequence[str]) -> dict[str, str]:
    """Return {engine module: the first Python that has it} for the engines that take the target."""
    probe = f"import importlib.util as u; print(*[n for n in {ENGINES[target]!r} if u.find_spec(n)])"
    found: dict[str, str] = {}
    for python in (sys.executable, *pythons):
        try:
            answer = subprocess.run([python, "-c", probe], capture_output=True, text=True, env=_environment())
        except OSError as error:
            raise OptionError(f"--engine-python {python} cannot be run: {error.strerror}.") from error
        if answer.returncode:
            raise OptionError(f"--engine-python {python} is no working Python: {_last_line(answer.stderr)}.")
        found = dict.fromkeys(answer.stdout.split(), python) | found
    return {name: found[name] for name in ENGINES[target] if name in found}


def text_ids(directory: Path, text: str, n_positions: int) -> tuple[list[int], str]:
    """Return at least n_positions token ids of a text source's beginning, and the text that they are of."""
    tokenizer = load_tokenizer(directory)
    sample = ""
    for document in documents(text, tokenizer):
        sample += document
        if len(sample) > 16 * n_positions:
            break
    sample = sample[: 16 * n_positions]
    ids = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < n_positions:
        raise CalibrationError(f"too little text: {text} has {len(ids)} tokens, --verify needs {n_positions}.")
    return ids, sample


def folded_run(model: Any, ids: list[int]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return (logits [n, vocabulary] over the ids, greedy tokens after the first ids) of the folded model."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
        step = model(torch.tensor([ids[:_N_PROMPT]]), use_cache=True)
        tokens: list[int] = []
        for _ in range(_N_GENERATE):
            tokens.append(int(step.logits[0, -1].argmax()))
            step = model(torch.tensor([tokens[-1:]]), use_cache=True, **cache_argument(model, cache_of(step)))
    return logits, tokens


def failures(checks: Sequence[EngineCheck]) -> None:
    """Raise OutputError naming the first engine that failed."""
    for check in checks:
        if check.error:
            raise OutputError(f"{check.engine} does not run the export: {check.error}")
        if check.passed is False:
            raise OutputError(
                f"{check.engine} {check.version} differs from the folded model: logits by "
                f"{check.max_logit_difference:.2g} (at most {LOGIT_LIMITS[check.engine]:g}), {check.same_tokens} of "
                f"{check.n_generate} greedy tokens, {check.bytes_per_token:,.0f} bytes a token for {check.claimed:,}"
                f"{', and its tokenizer cuts text differently' if check.same_tokenization is False else ''}."
            )


def _check(
    name: str,
    python: str,
    request: dict[str, Any],
    logits: np.ndarray[Any, Any],
    tokens: list[int],
    result: ExportResult,
) -> EngineCheck:
    claimed = 4 * result.cache_numbers_per_token
    try:
        said, theirs = _run_engine(name, python, request)
    except OutputError as error:
        nan = float("nan")
        return EngineCheck(name, "", nan, 0, len(logits), len(tokens), nan, claimed, "", None, False, str(error))
    difference = float(np.abs(theirs - logits).max()) if theirs.shape == logits.shape else float("inf")
    same = next((i for i, (a, b) in enumerate(zip(tokens, said["tokens"], strict=True)) if a != b), len(tokens))
    cache_fits = abs(said["bytes_per_token"] / claimed - 1) < _CACHE_TOLERANCE
    same_text = said["text_ids"] == request["all_ids"] if "text_ids" in said else None
    exact = difference <= LOGIT_LIMITS[name] and same == len(tokens)
    rounded = result.dtype not in ("float32", "f32")
    return EngineCheck(
        engine=name,
        version=said["version"],
        max_logit_difference=difference,
        same_tokens=same,
        n_positions=len(logits),
        n_generate=len(tokens),
        bytes_per_token=said["bytes_per_token"],
        claimed=claimed,
        said=said["said"],
        same_tokenization=same_text,
        passed=False if not cache_fits or same_text is False else None if rounded else exact,
    )


def _run_engine(name: str, python: str, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Return what an engine's script reports, and its logits. Raises OutputError with its last words if it fails."""
    script = Path(__file__).with_name("engines") / f"{name}_engine.py"
    with tempfile.TemporaryDirectory(prefix="kvcompress-verify-") as scratch:
        files = [Path(scratch) / f for f in ("request.json", "result.json", "logits.npy")]
        files[0].write_text(json.dumps(request))
        try:
            run = subprocess.run(
                [python, str(script), *map(str, files)],
                capture_output=True,
                text=True,
                errors="replace",
                cwd=scratch,
                env=_environment(),
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise OutputError(f"no answer within {_TIMEOUT_SECONDS} seconds.") from error
        if run.returncode or not files[1].is_file():
            raise OutputError(_last_line(run.stderr) or f"exit code {run.returncode}")
        return json.loads(files[1].read_text()), np.load(files[2])


def _environment() -> dict[str, str]:
    """Return this process's environment without what would lead an engine to our own modules."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
