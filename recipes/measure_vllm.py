"""Does vLLM write the same text whatever it does meanwhile? Each way of running an output in a process of its own.

    python recipes/measure_vllm.py OUT --text FILE [--dtype float16] [--ways graphs eager ...] [--json]

All ways are given the same prompts of random lengths, greedy. Printed is the share of the written tokens that the
original model in transformers writes next itself, given the same text, and what another token lacks in log-likelihood;
so the plan should lose next to nothing (`compress --keep 0.5`, or `--keep 1 --ranks-only`). The way `off` is vLLM
without compression, which says what rounding alone costs.

With --run-time any plan will do: the share is that of tokens which our run time writes next over the same compressed
cache, token by token, and those that it writes by itself up to its first other one. Not for `preemption`, after which
the engine reads as a prompt, exactly, what the run time has packed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Tokens of a prompt's chunk in the way `chunks`.
CHUNK = 64
#: Different lengths of prompts with --run-time.
LENGTHS = 4
WAYS: dict[str, dict[str, Any]] = {
    "off": {"additional_config": {"kvcompress": "off"}},
    "graphs": {},
    "eager": {"enforce_eager": True},
    "no-prefix-caching": {"enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": CHUNK, "max_num_seqs": 32},
    "preemption": {"small": True},
    "arrivals": {"arrive": True, "max_num_seqs": 32},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
    "draft": {"draft": True},
    "two-gpus": {"tensor_parallel_size": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", required=True, help="a file that prompts are cut from")
    parser.add_argument("--original", type=Path, help="the uncompressed model, where OUT holds maps alone")
    parser.add_argument("--ways", nargs="+", default=[w for w in WAYS if w not in ("draft", "two-gpus")], choices=WAYS)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=400, help="tokens of a prompt, at most")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for vLLM's cache")
    parser.add_argument("--draft", help="the model that drafts tokens in the way `draft`")
    parser.add_argument("--run-time", action="store_true", help="compare with our run time over the same cache")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        write(*(Path(x) for x in options.child))
        return
    prompts = cut_prompts(options)
    judge = RunTime(options) if options.run_time else Judge(options.original or options.output, options.dtype)
    first: list[list[int]] | None = None
    for way in options.ways:
        started = time.perf_counter()
        found = run(options, way, prompts)
        if "passes" not in found:
            print(f"{way:18} did not run: {found['failure']}", flush=True)
            continue
        first = first or found["passes"][0]["texts"]
        for n, written in enumerate(found["passes"]):
            texts = written["texts"]
            alike = sum(a == b for a, b in zip(first, texts, strict=True))
            print(
                f"{way + ' again' * n:18} {judge.says(way, prompts, texts, written['cached'])}; "
                f"{alike}/{len(texts)} texts as {options.ways[0]}; {sum(written['cached'])} tokens found in the cache"
                f"{found['notes']}; {time.perf_counter() - started:.0f} s",
                flush=True,
            )


def cut_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Return prompts of random lengths, one after the other in the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.original or options.output)
    rng = random.Random(0)
    lengths = [rng.randint(1, options.longest) for _ in range(options.prompts)]
    if options.run_time:  # whose batches are of one length
        lengths = [lengths[i % LENGTHS] for i in range(options.prompts)]
    text = Path(options.text).read_text(encoding="utf-8")[: 8 * sum(lengths)]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


class Judge:
    """The original model in transformers, which reads whole texts at once."""

    def __init__(self, model: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"on {torch.cuda.get_device_name() if self.device == 'cuda' else 'a CPU'}, {dtype}", flush=True)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = loaded.to(self.device).eval()

    def says(self, way: str, prompts: list[list[int]], texts: list[list[int]], cached: list[int]) -> str:
        share, lacking, seen = self.agreement(prompts, texts)
        return f"{share:8.3%} of {seen} tokens; where another, it lacks {lacking:.4f} nats"

    def agreement(self, prompts: list[list[int]], texts: list[list[int]]) -> tuple[float, float, int]:
        """Return the share of tokens that are the model's own choice, what others lack in log-likelihood on average,
        and how many there were."""
        import torch

        same, lacking, n = 0, 0.0, 0
        with torch.no_grad():
            for prompt, text in zip(prompts, texts, strict=True):
                ids = torch.tensor([prompt + text], device=self.device)
                scores = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                own = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
                short = scores.amax(1) - own
                same, n = same + int((short == 0).sum()), n + len(text)
                lacking += float(short.sum())
        return same / n, lacking / max(1, n - same), n


class RunTime:
    """Our run time in transformers, over the output's compressed cache, and for the way `off` over its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from kvcompress.evaluate.sides import both_sides
        from kvcompress.runtime.load import load

        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}, {options.dtype}", flush=True)
        dtype = getattr(torch, options.dtype)
        self.original, self.compressed = both_sides(
            load(options.output, base=options.original, dtype=dtype, device=device)
        )

    def says(self, way: str, prompts: list[list[int]], texts: list[list[int]], cached: list[int]) -> str:
        import torch

        from kvcompress.evaluate.engine import follows

        side = self.original if way == "off" else self.compressed
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (prompt, found) in enumerate(zip(prompts, cached, strict=True)):
            groups.setdefault((len(prompt), found), []).append(i)
        hits = []
        for (length, found), members in groups.items():
            # What was found in the cache was read before; a prompt's chunks see those before them packed.
            pieces = range(CHUNK, length, CHUNK) if way == "chunks" else [found] if found else []
            read, written = (torch.tensor([rows[i] for i in members]) for rows in (prompts, texts))
            hits.append(follows(side, read, written, pieces=list(pieces)))
        seen = torch.cat(hits).double()
        return f"{float(seen.mean()):8.3%} of {seen.numel()} tokens, by itself {float(seen.cumprod(1).mean()):.2%}"


def run(options: argparse.Namespace, way: str, prompts: list[list[int]]) -> dict[str, Any]:
    import torch

    arguments = {
        "model": str(options.original or options.output),
        "dtype": options.dtype,
        "max_model_len": options.longest + options.new_tokens + 8,
        "max_num_seqs": min(64, options.prompts),
        "kv_cache_memory_bytes": int(options.memory * 2**30),
        "gpu_memory_utilization": 0.05,  # of the GPU's memory that must be free; the judge lies there, too
    }
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
    if options.original:
        arguments["additional_config"] = {"kvcompress": str(options.output)}
    arguments |= WAYS[way]
    if options.run_time and way == "chunks":  # so that all chunks but the last are full
        arguments |= {"max_num_seqs": 1, "enable_prefix_caching": False}
    elif options.run_time:  # each prompt in one step: a second chunk would see the first one packed
        most = arguments["max_num_seqs"] * arguments["max_model_len"]  # more vLLM does not take
        arguments["max_num_batched_tokens"] = min(most, max(8192, sum(map(len, prompts)) + options.prompts))
    if arguments.pop("draft", False):
        arguments["speculative_config"] = {"method": "draft_model", "model": options.draft, "num_speculative_tokens": 3}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("settings.json", "result.json")]
        settings = {"arguments": arguments, "prompts": prompts, "new_tokens": options.new_tokens}
        files[0].write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, __file__, str(options.output), "--text", "-", "--child", *map(str, files)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if not files[1].is_file():
            lines = [x for x in finished.stderr.splitlines() if "Error" in x] or finished.stderr.splitlines()[-1:]
            return {"failure": " | ".join(lines[-3:])}
        found: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        return found


def write(settings_file: Path, result: Path) -> None:
    """Run one way; its own process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    arguments, prompts = settings["arguments"], settings["prompts"]
    small, arrive = arguments.pop("small", False), arguments.pop("arrive", False)
    if small:  # a few blocks more than the longest sequence needs
        arguments |= {"num_gpu_blocks_override": blocks_for(arguments["max_model_len"])}
    preempted = count_preemptions()
    llm = LLM(**arguments)
    sampling = SamplingParams(max_tokens=settings["new_tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    if arrive:
        passes = [arriving(llm.llm_engine, prompts, sampling)]
    else:
        passes = []
        for _ in range(2 if arguments.get("enable_prefix_caching") is None else 1):  # the second finds prefixes
            outputs = llm.generate([{"prompt_token_ids": x} for x in prompts], sampling, use_tqdm=False)
            passes.append(written_by(outputs))
    notes = f", preempted {len(preempted)} times" if preempted else ""
    result.write_text(json.dumps({"passes": passes, "notes": notes}), encoding="utf-8")


def written_by(outputs: list[Any]) -> dict[str, list[Any]]:
    """Return the texts of finished requests, and how many tokens of each prompt were found in the cache."""
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    return {"texts": texts, "cached": [output.num_cached_tokens or 0 for output in outputs]}


def blocks_for(length: int) -> int:
    """Return how many blocks of the pool two sequences of a length need about, whatever a page holds."""
    return 2 * (-(-length // 32)) + 12


def count_preemptions() -> list[int]:
    from vllm.v1.core.sched.scheduler import Scheduler

    counted: list[int] = []
    original = Scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(*args, **kwargs)

    Scheduler._preempt_request = preempt
    return counted


def arriving(engine: Any, prompts: list[list[int]], sampling: Any) -> dict[str, list[Any]]:
    """Return what requests that arrive at random write, up to three before each step."""
    rng, waiting, found = random.Random(1), list(range(len(prompts))), {}
    while waiting or engine.has_unfinished_requests():
        for i in [waiting.pop(0) for _ in range(min(len(waiting), rng.randint(0, 3)))]:
            engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, sampling)
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = output
    return written_by([found[i] for i in range(len(prompts))])


if __name__ == "__main__":
    main()
