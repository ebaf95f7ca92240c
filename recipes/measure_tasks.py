"""Measure tasks, retrieval, perplexity by position and greedy agreement of several outputs; regenerate the tables.

    python recipes/measure_tasks.py run OUT [OUT ...] --tasks FILES_OR_DIRECTORIES --book TEXT --work DIR
    python recipes/measure_tasks.py prepare OUT --tasks NAMES_OR_FILES --fewshot 5 --limit 500 --work DIR
    python recipes/measure_tasks.py stock OUT --tasks FILES_OR_DIRECTORIES --work DIR

`run` works through all stages for all outputs, prints Markdown tables and writes JSON into --work as it goes. What is
there already is not measured again, and the outputs share the original's answers. Where lm-eval is not installed (a
GPU machine without a network), the task stage only collects the models' answers; the same command with the same
--work where lm-eval is installed then makes the table without running a model.

`prepare`, where lm-eval is installed, writes what lm-eval asks into --work: then `run` collects the answers to that
without lm-eval, few-shot examples and tasks of lm-eval's own included.

`stock` compares the original's numbers with those of lm-eval's own `hf` model class on the same tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.generation import evaluate_generation
from kvcompress.evaluate.positions import evaluate_positions
from kvcompress.evaluate.retrieval import evaluate_retrieval
from kvcompress.evaluate.scoring import Pair
from kvcompress.evaluate.sides import both_sides
from kvcompress.evaluate.task_files import find_task_files
from kvcompress.evaluate.tasks import evaluate_tasks, lm_eval_pairs, task_pairs
from kvcompress.runtime.load import load

#: What `prepare` writes into --work.
PREPARED = "requests.npz"
STAGES = ("tasks", "retrieval", "positions", "generation")


class Output:
    """One compressed output, loaded when a stage needs it."""

    def __init__(self, directory: str, args: argparse.Namespace) -> None:
        self.directory, self.args = Path(directory), args
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            dtype = getattr(torch, self.args.dtype)
            self._model = load(self.directory, base=self.args.base, dtype=dtype, device=self.args.device)
        return self._model

    @property
    def tokenizer(self) -> Any:
        whole = (self.directory / "config.json").is_file()
        return load_tokenizer(self.directory if whole else Path(self.args.base))

    def measured(self, stage: str, measure: Any) -> dict[str, Any] | None:
        """Return a stage's figures from --work, or measure and write them; None if they cannot be had here."""
        file = Path(self.args.work) / f"{self.directory.name}-{stage}.json"
        if file.is_file():
            return json.loads(file.read_text())
        started = time.monotonic()
        result = measure(self)
        if result is None:
            return None
        document = result.to_json() | {"seconds": time.monotonic() - started, "device": _device_name(self.args.device)}
        file.write_text(json.dumps(document, indent=1))
        return document


def run_tasks(output: Output) -> Any:
    args = output.args
    file = Path(args.work) / "answers-tasks.jsonl"
    if find_spec("lm_eval"):
        options = {"limit": args.limit, "batch_size": args.batch_size, "recent": args.recent}
        return evaluate_tasks(
            output.model, output.tokenizer, args.tasks, answers=file, n_fewshot=args.fewshot, **options
        )
    if args.pairs is None:  # the same for all outputs of a model
        args.pairs = _pairs(output)
    pairs = args.pairs
    with Answers(file) as known:
        for side in both_sides(output.model, recent=args.recent):
            started = time.monotonic()
            known.scores(side, pairs, batch_size=args.batch_size)
            seconds = time.monotonic() - started
            print(f"{output.directory.name}, {side.name}: {len(pairs)} requests answered, {seconds:.1f} s")
    return None


def _pairs(output: Output) -> list[Pair]:
    args, prepared = output.args, Path(output.args.work) / PREPARED
    if prepared.is_file():
        stored = np.load(prepared)
        parts = np.split(stored["tokens"], stored["lengths"].cumsum()[:-1])
        return [Pair(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    if args.fewshot:
        raise SystemExit("--fewshot needs lm-eval, or what the command `prepare` wrote where it is installed")
    files = [f for name in args.tasks for f in find_task_files(name)]
    return task_pairs(output.tokenizer, files, limit=args.limit)


def prepare(args: argparse.Namespace) -> None:
    """Write the token ids of all that lm-eval asks: contexts and continuations in turn."""
    tokenizer = Output(args.outputs[0], args).tokenizer
    pairs = lm_eval_pairs(tokenizer, args.tasks, limit=args.limit, n_fewshot=args.fewshot)
    parts = [part for pair in pairs for part in (pair.context, pair.continuation)]
    tokens = np.concatenate([np.array(part, dtype=np.int32) for part in parts])
    file = Path(args.work) / PREPARED
    np.savez_compressed(file, tokens=tokens, lengths=np.array([len(part) for part in parts], dtype=np.int32))
    print(f"{file}: {len(pairs)} requests of {len(tokens) / len(pairs):.0f} tokens on average")


def run_retrieval(output: Output) -> Any:
    args = output.args
    return evaluate_retrieval(
        output.model,
        output.tokenizer,
        args.book,
        lengths=args.lengths,
        n_prompts=args.prompts,
        batch_size=args.batch_size,
        recent=args.recent,
        answers=Path(args.work) / "answers-retrieval.jsonl",
    )


def run_positions(output: Output) -> Any:
    args = output.args
    options = {"seq_len": args.seq_len, "max_windows": args.max_windows, "recent": args.recent}
    return evaluate_positions(output.model, output.tokenizer, args.book, **options)


def run_generation(output: Output) -> Any:
    args = output.args
    return evaluate_generation(
        output.model,
        output.tokenizer,
        args.book,
        prompt_tokens=512,
        new_tokens=args.new_tokens,
        n_prompts=16,
        batch_size=16,
    )


def print_tasks(results: dict[str, dict[str, Any]]) -> None:
    for name, result in results.items():
        print(
            f"\n| {name}: task | metric | original | compressed | difference | p | seen compressed |\n"
            + "|---" * 7
            + "|"
        )
        for task in result["tasks"]:
            for m in task["metrics"]:
                share = task["compressed_share"]
                print(_task_row(task["task"], m, "" if share is None else f"{share:.1%}"))
        if result["average"]:
            print(_task_row("**average**", result["average"], ""))


def _task_row(task: str, m: dict[str, Any], share: str) -> str:
    def error(x: float | None) -> str:
        return "" if x is None else f" ± {x:.4f}"

    p = m["paired"]
    difference = f"{p['difference']:+.4f}{error(p['stderr'])} | {p['p_value']:.3f}" if p else "|"
    star = "*" if m["headline"] else ""
    sides = f"{m['original']:.4f}{error(m['original_stderr'])} | {m['compressed']:.4f}{error(m['compressed_stderr'])}"
    return f"| {task} | {m['metric']}{star} | {sides} | {difference} | {share} |"


def print_retrieval(results: dict[str, dict[str, Any]]) -> None:
    any_result = next(iter(results.values()))
    for kind in any_result["found"]:
        depths = any_result["protocol"]["depths"]
        print(f"\n| {kind} | tokens | {' | '.join(f'depth {d:g}' for d in depths)} | all | log-likelihood |")
        print("|---" * (4 + len(depths)) + "|")
        for length in any_result["protocol"]["lengths"]:
            for name, side, result in [("original", "original", any_result)] + [
                (n, "compressed", r) for n, r in results.items()
            ]:
                cells = [c for c in result["cells"] if (c["kind"], c["length"]) == (kind, length)]
                found = [c[side] for c in cells]
                logprob = sum(c[f"{side}_logprob"] for c in cells) / len(cells)
                row = " | ".join(f"{f:.0%}" for f in [*found, sum(found) / len(found)])
                print(f"| {name} | {length} | {row} | {logprob:.3f} |")
        for name, result in results.items():
            f, logprob = result["found"][kind], result["logprob"][kind]
            print(
                f"\n{name}, {kind}: {f['difference']:+.2%} found (McNemar p {f['p_value']:.3f}, n {f['n']}), "
                f"log-likelihood {logprob['difference']:+.4f} nats (p {logprob['p_value']:.3f})"
            )


def print_positions(results: dict[str, dict[str, Any]]) -> None:
    for part in ("quarters", "doubling"):
        print(f"\n| positions | original | {' | '.join(results)} |\n" + "|---" * (2 + len(results)) + "|")
        for i, row in enumerate(next(iter(results.values()))[part]):
            bins = [result[part][i] for result in results.values()]
            ratios = " | ".join(f"{b['ratio']:.4f}{_error(b['ratio_stderr'])}" for b in bins)
            print(f"| {row['start']} to {row['stop'] - 1} | {row['original']:.3f} | {ratios} |")
    for name, result in results.items():
        growth, stderr = result["last_over_first"], result["last_over_first_stderr"]
        print(f"\n{name}: ratio in the last quarter over that in the first {growth:.4f}{_error(stderr)}")


def print_generation(results: dict[str, dict[str, Any]]) -> None:
    print("\n| output | common prefix | median | identical | same place | next token |\n" + "|---" * 6 + "|")
    for name, r in results.items():
        shares = " | ".join(f"{r[key]:.1%}" for key in ("identical", "same_place", "next_token"))
        prefix = f"{r['common_prefix']:.1f} of {r['protocol']['new_tokens']} | {r['median_prefix']:.1f}"
        print(f"| {name} | {prefix} | {shares} |")


def _error(x: float | None) -> str:
    return "" if x is None else f" ± {x:.4f}"


def stock(args: argparse.Namespace) -> None:
    """Print the original's numbers beside those of lm-eval's own model class, and the largest difference."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kvcompress.evaluate.lm_eval_model import FileTask
    from kvcompress.evaluate.task_files import load_task
    from kvcompress.runtime.attach import detach

    output = Output(args.outputs[0], args)
    ours = output.measured("tasks", run_tasks)
    detach(output.model)
    lm = HFLM(pretrained=output.model, tokenizer=output.tokenizer, batch_size=args.batch_size)
    manager = TaskManager(include_defaults=False)
    files = [f for name in args.tasks for f in find_task_files(name)]
    loaded = manager.load([FileTask(load_task(f)) for f in files])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=args.fewshot or 0)
        task.set_fewshot_seed(seed=1234)
    theirs = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=args.limit, bootstrap_iters=0)["results"]
    print("| task | metric | kvcompress, original | lm-eval hf |\n|---|---|---|---|")
    largest = 0.0
    for row in (ours or {})["tasks"]:
        for m in row["metrics"]:
            other = theirs[row["task"]][f"{m['metric']},none"]
            print(f"| {row['task']} | {m['metric']} | {m['original']:.6f} | {other:.6f} |")
            largest = max(largest, abs(m["original"] - other) / max(1.0, abs(other)))
    print(f"\nlargest difference, relative for figures above 1: {largest:.2e}")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "prepare", "stock"))
    parser.add_argument("outputs", nargs="+", metavar="OUT", help="directories made by kvcompress compress")
    parser.add_argument("--stages", default=",".join(STAGES), help="which of tasks, retrieval, positions, generation")
    parser.add_argument("--tasks", nargs="+", default=[], help="task files (.jsonl) or directories of them")
    parser.add_argument("--book", help="a long text")
    parser.add_argument("--base", help="the original checkpoint, for outputs that hold only maps")
    parser.add_argument("--work", required=True, help="directory for figures and answers; what it holds is reused")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch-size", type=int, default=1024, help="most inputs in a batch; its tokens are limited too"
    )
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--fewshot", type=int)
    parser.add_argument("--recent", type=int, help="another window than the outputs' own; generation keeps that")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--prompts", type=int, default=10, help="of each kind, length and depth")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    args.pairs = None
    sys.stdout.reconfigure(line_buffering=True)  # what is measured is seen at once, also in a log
    Path(args.work).mkdir(parents=True, exist_ok=True)
    if args.command != "run":
        {"prepare": prepare, "stock": stock}[args.command](args)
        return
    outputs = [Output(directory, args) for directory in args.outputs]
    for stage in args.stages.split(","):
        if not (args.tasks if stage == "tasks" else args.book):
            continue
        results = {o.directory.name: r for o in outputs if (r := o.measured(stage, globals()[f"run_{stage}"]))}
        if results:
            globals()[f"print_{stage}"](results)


if __name__ == "__main__":
    main()
