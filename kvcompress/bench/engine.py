"""`bench --engine vllm`: tokens that fit and speed in vLLM itself, of its own caches and of ours, one process for
each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcompress.bench.random_model import llama_config, random_plan
from kvcompress.bench.workload import SHAPES, Shape, components_at_a_time, typical_counts
from kvcompress.checkpoint.maps import MAPS_FILE, save_maps
from kvcompress.errors import OptionError

#: What vLLM itself can keep, by the name of its kv_cache_dtype; ours is "kvcompress".
CACHES = ("bf16", "fp8", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
OURS = "kvcompress"
#: Names an error at the end of a trace.
_NAMED = re.compile(r"\b\w*(Error|Exception): ")
#: Lines of a process that are shown where it ended with an error.
_LAST_LINES = 40
#: Begins a line of kvcompress.vllm.measure that says a measurement.
MEASURED = "measured "


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """One cache in the engine, or why it did not run. Steps: batch, context, milliseconds, tokens a second."""

    cache: str
    keep: float | None
    device: str = ""
    tokens_that_fit: int = 0
    first_token_seconds: float | None = None
    continued_seconds: float | None = None
    steps: tuple[dict[str, Any], ...] = ()
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EngineWorkload:
    """What is timed: sequences as (batch or None for the most, context); tokens of a prompt and of what follows it."""

    sequences: tuple[tuple[int | None, int], ...]
    prompt: int = 0
    continuation: int = 0
    max_model_len: int = 0

    @property
    def length(self) -> int:
        needed = [context for _, context in self.sequences] + [self.prompt + self.continuation + 1]
        return max(*needed, self.max_model_len)


def time_engine(
    shape: str, keeps: Sequence[float], workload: EngineWorkload, *, caches: Sequence[str], turn: int,
    arguments: dict[str, Any] | None = None, device: str = "cuda", say: Callable[[str], None] = lambda _: None,
) -> list[EngineTiming]:  # fmt: skip
    """Return a timing for each of vLLM's caches and for ours at each keep, in the order in which they ran.

    vLLM's exact cache comes first and ours next, so that a run that is cut short has compared them. arguments: more of
    vLLM's LLM; say: gets a line when a cache is begun, and for each of its measurements as it comes. Raises
    OptionError for an unknown shape or cache, and for what vLLM lacks on a CPU.
    """
    if shape not in SHAPES:
        raise OptionError(f"shape '{shape}' is unknown. Choose from {', '.join(SHAPES)}.")
    unknown = [cache for cache in caches if cache not in CACHES]
    if unknown:
        raise OptionError(f"cache '{unknown[0]}' is none of vLLM's. Choose from {', '.join(CACHES)}.")
    if device == "cpu" and set(caches) - {"bf16"}:
        # On a CPU vLLM takes the option and keeps an exact cache all the same.
        raise OptionError("vLLM has low-bit caches on GPUs alone. Leave out all but bf16 from --caches.")
    timings = []
    with tempfile.TemporaryDirectory() as scratch:
        exact, others = ([(c, None) for c in caches if (c == "bf16") == first] for first in (True, False))
        for cache, keep in [*exact, *((OURS, keep) for keep in keeps), *others]:
            name = f"{cache}{'' if keep is None else f' at {keep:g}'}"
            say(f"running {name} in vLLM")
            directory = Path(scratch) / f"{cache}-{keep}"
            write_random_model(directory, SHAPES[shape], keep, workload.length, turn=turn, device=device)
            settings = _settings(directory, cache, workload, arguments or {}, device)
            timings.append(_run(cache, keep, settings, directory, say))
    return timings


def write_random_model(
    directory: Path, shape: Shape, keep: float | None, length: int, *, turn: int, device: str
) -> None:
    """Write a config of the shape without weights, and random maps where a keep is given."""
    config = llama_config(shape)
    config.max_position_embeddings = length
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    if keep is None:
        return
    counts = typical_counts(shape.width, keep, at_a_time=components_at_a_time(shape, turn))
    plan, maps = random_plan(shape, counts, counts, dtype, turn=turn)
    # every layer has the same random maps, and a file holds no tensor twice
    own = {site: replace(m, **{n: t.clone() for n, t in vars(m).items() if t is not None}) for site, m in maps.items()}
    save_maps(own, directory / MAPS_FILE)
    plan.save(directory)


def _settings(
    directory: Path, cache: str, workload: EngineWorkload, arguments: dict[str, Any], device: str
) -> dict[str, Any]:
    own = {"max_model_len": workload.length, "dtype": "bfloat16" if device == "cuda" else "float32"}
    if cache not in (OURS, "bf16"):
        own["kv_cache_dtype"] = cache
    return {
        "model": str(directory),
        "arguments": own | arguments,
        "workloads": [list(w) for w in workload.sequences],
        "prompt": workload.prompt,
        "continuation": workload.continuation,
    }


def _run(
    cache: str, keep: float | None, settings: dict[str, Any], directory: Path, say: Callable[[str], None]
) -> EngineTiming:
    """Return what one cache measured; of one that failed on the way, what it had measured by then and why."""
    files = [directory / name for name in ("settings.json", "result.json")]
    files[0].write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "kvcompress.vllm.measure", *map(str, files)]
    last: deque[str] = deque(maxlen=400)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            if line.startswith(MEASURED):
                say(f"{cache} {keep or ''}: {line.removeprefix(MEASURED).strip()}")
    found = json.loads(files[1].read_text(encoding="utf-8")) if files[1].is_file() else {"steps": []}
    failure = None
    if process.returncode:
        failure = reason_of(last) or f"exit {process.returncode}"
        say("".join(list(last)[-_LAST_LINES:]).rstrip())
    return EngineTiming(cache, keep, failure=failure, **(found | {"steps": tuple(found["steps"])}))


def reason_of(lines: Iterable[str]) -> str | None:
    """Return which of the last lines of a process says why it ended: that of its error; None if it said nothing.

    Lines behind it may explain (CUDA's do), and vLLM's main process points to its workers' "root cause" above.
    """
    spoken = [line.strip() for line in lines if line.strip()]
    named = [line for line in spoken if _NAMED.search(line) and "root cause" not in line]
    said = named or [line for line in spoken if "Error" in line] or spoken
    return said[-1] if said else None
