"""`bench --engine vllm`: tokens that fit and speed in vLLM itself, of its own caches and of ours, one process for
each."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvcompress.bench.process import last_words, limited_process, reason_of
from kvcompress.bench.random_model import llama_config, random_plan
from kvcompress.bench.workload import SHAPES, Shape, components_at_a_time, typical_counts
from kvcompress.checkpoint.maps import MAPS_FILE, save_maps
from kvcompress.errors import OptionError
from kvcompress.runtime.output import read_output

#: What vLLM itself can keep, by the name of its kv_cache_dtype; ours is "kvcompress".
CACHES = ("bf16", "fp8", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
OURS = "kvcompress"
#: Lines of a process that are shown where it ended with an error.
_LAST_LINES = 40
#: Begins a line of kvcompress.vllm.measure that says a measurement.
MEASURED = "measured "


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """One cache in the engine, or why it did not run to its end. Steps: batch, context, milliseconds, tokens a second.

    start_seconds: until the engine is up; warm_up_seconds: of its first prompt, which compiles what is left.
    """

    cache: str
    keep: float | None
    device: str = ""
    tokens_that_fit: int = 0
    start_seconds: float | None = None
    warm_up_seconds: float | None = None
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


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How each cache is run. arguments: more of vLLM's LLM; limit: seconds that a cache may take, its start among them.

    say: gets a line when a cache is begun, and for each of its measurements as it comes.
    """

    device: str = "cuda"
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    say: Callable[[str], None] = lambda _: None


def time_engine(
    shape: str, keeps: Sequence[float], workload: EngineWorkload, *, caches: Sequence[str], turn: int,
    options: EngineOptions,
) -> list[EngineTiming]:  # fmt: skip
    """Return a timing for each of vLLM's caches and for ours at each keep, in the order in which they ran.

    Weights are random. vLLM's exact cache comes first and ours at the first keep next, so that a run that is cut short
    has compared them; vLLM's others follow, and then ours at the other keeps. Raises OptionError for an unknown shape
    or cache, and for what vLLM lacks on a CPU.
    """
    if shape not in SHAPES:
        raise OptionError(f"shape '{shape}' is unknown. Choose from {', '.join(SHAPES)}.")
    timings = []
    with tempfile.TemporaryDirectory() as scratch:
        for cache, keep in _in_order(caches, keeps, options):
            directory = Path(scratch) / f"{cache}-{keep}"
            write_random_model(directory, SHAPES[shape], keep, workload.length, turn=turn, device=options.device)
            settings = _settings(directory, cache, workload, options, load_format="dummy")
            timings.append(_run(cache, keep, settings, options))
    return timings


def time_checkpoint(
    output: Path, workload: EngineWorkload, *, caches: Sequence[str], options: EngineOptions
) -> list[EngineTiming]:
    """Return timings as time_engine, of a compressed checkpoint with its own weights: ours as its plan has it, vLLM's
    caches with its plan left out.

    Raises OptionError for maps alone, an unknown cache, and what vLLM lacks on a CPU; CheckpointError where there is no
    compressed checkpoint.
    """
    plan, _ = read_output(output)
    if not (output / "config.json").is_file():
        raise OptionError(f"{output} holds maps alone; --engine runs a whole checkpoint. Compress without --maps-only.")
    timings = []
    for cache, keep in _in_order(caches, [plan.keep], options):
        timings.append(_run(cache, keep, _settings(output, cache, workload, options), options))
    return timings


def _in_order(caches: Sequence[str], keeps: Sequence[float], options: EngineOptions) -> list[tuple[str, float | None]]:
    unknown = [cache for cache in caches if cache not in CACHES]
    if unknown:
        raise OptionError(f"cache '{unknown[0]}' is none of vLLM's. Choose from {', '.join(CACHES)}.")
    if options.device == "cpu" and set(caches) - {"bf16"}:
        # On a CPU vLLM takes the option and keeps an exact cache all the same.
        raise OptionError("vLLM has low-bit caches on GPUs alone. Leave out all but bf16 from --caches.")
    exact, others = ([(c, None) for c in caches if (c == "bf16") == first] for first in (True, False))
    ours = [(OURS, keep) for keep in keeps]
    return [*exact, *ours[:1], *others, *ours[1:]]


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


def _settings(model: Path, cache: str, workload: EngineWorkload, options: EngineOptions, **more: Any) -> dict[str, Any]:
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    own: dict[str, Any] = {"max_model_len": workload.length, "dtype": dtype}
    if cache != OURS:
        own["additional_config"] = {OURS: "off"}  # whatever plan the checkpoint or the environment names
        own["kv_cache_dtype"] = "auto" if cache == "bf16" else cache
    return {
        "model": str(model),
        "arguments": own | more | options.arguments,
        "workloads": [list(w) for w in workload.sequences],
        "prompt": workload.prompt,
        "continuation": workload.continuation,
    }


def _run(cache: str, keep: float | None, settings: dict[str, Any], options: EngineOptions) -> EngineTiming:
    """Return what one cache measured; of one that failed on the way, what it had measured by then and why."""
    name = name_of(cache, keep)
    options.say(f"running {name} in vLLM")
    last: deque[str] = deque(maxlen=400)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / file for file in ("settings.json", "result.json")]
        files[0].write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, "-u", "-m", "kvcompress.vllm.measure", *map(str, files)]
        with limited_process(command, options.limit) as (process, late):
            assert process.stdout is not None
            for line in process.stdout:
                last.append(line)
                if line.startswith(MEASURED):
                    options.say(f"{name}: {line.removeprefix(MEASURED).strip()}")
        found = json.loads(files[1].read_text(encoding="utf-8")) if files[1].is_file() else {"steps": []}
    failure = None
    if late.is_set():
        failure = f"not through after {options.limit:g} s; it had said: {last_words(last)}"
    elif process.returncode:
        failure = reason_of(last) or f"exit {process.returncode}"
        options.say("".join(list(last)[-_LAST_LINES:]).rstrip())
    return EngineTiming(cache, keep, failure=failure, **(found | {"steps": tuple(found["steps"])}))


def name_of(cache: str, keep: float | None) -> str:
    """Return how a cache is called in lines and tables, for example "kvcompress 0.125"."""
    return cache if keep is None else f"{cache} {keep:.4g}"
