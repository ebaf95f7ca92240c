"""Regenerate the tables of docs/measurements.md: calibrate once, plan and evaluate many times on one loaded model.

    python recipes/measure.py bases MODEL --calibration TEXT --text TEXT [--max-windows 40] [--keep 0.25 --keep 0.125]
    python recipes/measure.py calibration MODEL --candidate TEXT ... --text TEXT ...

Methods have bits where they can; --ranks-only makes all of them keep 16-bit numbers.

Each row is decode-faithful (float32); it prints a Markdown table and, with --out, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.errors import BudgetError
from kvcompress.evaluate.perplexity import Original, evaluate_attached
from kvcompress.evaluate.windows import Windows
from kvcompress.options import BIT_BASES, FOLDABLE_KEY_BASES, KEY_BASES, POLICY_NAMES, VALUE_BASES, CompressOptions
from kvcompress.planning import make_plan, refit_values
from kvcompress.runtime.attach import attach_plan, detach

KEEPS = (0.25, 0.125, 0.0625)
WINDOWS = (0, 64)


class Bench:
    """One model on one device, with the moments of each calibration kept."""

    def __init__(self, args: argparse.Namespace, checkpoint: Checkpoint) -> None:
        self.args, self.checkpoint = args, checkpoint
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        self.model: Any = model.to(self.device).eval()
        self.originals: dict[str, Original] = {}
        self.rows: list[dict[str, Any]] = []
        self._plans: dict[str, Any] = {}

    def original(self, text: str) -> Original:
        """Return the uncompressed model on the windows of a text, run over each of them once."""
        if text not in self.originals:
            windows = Windows.of(self.tokenizer, text, self.args.seq_len, self.args.max_windows)
            self.originals[text] = Original(self.model, windows, remember=True)
        return self.originals[text]

    def ratio(self, options: CompressOptions, text: str, recent: int) -> dict[str, float]:
        started = time.monotonic()
        if repr(options) not in self._plans:
            moments = obtain_moments(self.checkpoint, Path(self.args.work) / "x", options, dtype="float32")
            plan, maps, _ = make_plan(self.checkpoint, moments, options)
            detach(self.model)  # the plan before
            refit_values(lambda: self.model, plan, maps, moments)
            self._plans = {repr(options): (plan, maps)}
        plan, maps = self._plans[repr(options)]
        attach_plan(self.model, plan, maps)
        result = evaluate_attached(self.model, self.original(text), recent=recent)
        return {
            "ratio": result.perplexity["ratio"],
            "original": result.perplexity["original"],
            "kl": result.kl_nats,
            "keep": plan.keep,
            "predicted": plan.predicted_loss,
            "maps_share": plan.maps_bytes / plan.weight_bytes,
            "seconds": time.monotonic() - started,
        }


def bases_table(bench: Bench) -> None:
    """Every key basis with every policy, every value basis, and the published methods."""
    args = bench.args
    texts = tuple(args.calibration)
    default = CompressOptions(calibration=texts, tokens=args.tokens, seq_len=args.seq_len, ranks_only=True)
    methods = {f"{b} / latent, {p}": replace(default, key_basis=b, policy=p) for b in KEY_BASES for p in POLICY_NAMES}
    methods |= {f"latent / {v}, loss": replace(default, value_basis=v) for v in VALUE_BASES if v != "latent"}
    methods |= {f"{k} / head, loss": replace(default, key_basis=k, value_basis="head") for k in FOLDABLE_KEY_BASES}
    methods["palu: C only, uniform"] = replace(default, metric="activation", policy="uniform")
    paper = replace(default, key_basis="head", value_basis="head", metric="weights")
    methods["mea-half: data-free SVD, middle half"] = replace(paper, policy="middle")
    methods["mea-deep: data-free SVD, all but three layers"] = replace(paper, policy="middle", layers="deep")
    methods["mea: data-free SVD, every layer"] = replace(paper, policy="uniform")
    print(
        f"| keys / values, policy | {' | '.join(f'keep {k}, window {w}' for k in args.keeps for w in args.windows)} |"
    )
    print("|---" * (1 + len(args.keeps) * len(args.windows)) + "|")
    for name, options in methods.items():
        if not re.search(args.methods, name):
            continue
        cells = []
        if not args.ranks_only and {options.key_basis, options.value_basis} <= set(BIT_BASES) and "palu" not in name:
            options = replace(options, ranks_only=False)
        for keep in args.keeps:
            for recent in args.windows:
                try:
                    row = bench.ratio(replace(options, keep=keep, recent=recent), args.text[0], recent)
                except BudgetError:
                    cells.append("not possible")
                    continue
                bench.rows.append({"method": name, "keep_asked": keep, "recent": recent, **row})
                left = "" if abs(row["keep"] - keep) < 0.01 else f" ({row['keep']:.0%} left)"
                cells.append(f"{row['ratio']:.4f}{left}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def calibration_table(bench: Bench) -> None:
    """Every calibration text against every evaluation text."""
    args = bench.args
    for keep in args.keeps:
        print(f"| calibration, keep {keep}, window 64 | {' | '.join(Path(t).name for t in args.text)} |")
        print("|---" * (1 + len(args.text)) + "|")
        for candidate in args.candidate:
            options = CompressOptions(
                keep=keep,
                calibration=tuple(candidate.split("+")),
                tokens=args.tokens,
                seq_len=args.seq_len,
                ranks_only=args.ranks_only,
            )
            cells = []
            for text in args.text:
                row = bench.ratio(options, text, 64)
                bench.rows.append({"calibration": candidate, "text": Path(text).name, "keep_asked": keep, **row})
                cells.append(f"{row['ratio']:.4f}")
            print(f"| {candidate} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("bases", "calibration"))
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--candidate", action="append", default=[], help="calibration texts, joined by +")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=40)
    parser.add_argument("--methods", default="", help="regular expression: only the rows whose name it matches")
    parser.add_argument("--keep", type=float, action="append", help=f"budgets: {KEEPS} by default")
    parser.add_argument("--ranks-only", action="store_true")
    parser.add_argument("--window", type=int, action="append", help="recent windows to measure: 0 and 64 by default")
    parser.add_argument("--work", default="measurements", help="where moments are kept between rows")
    parser.add_argument("--out", help="JSON file for all figures")
    args = parser.parse_args()
    args.windows, args.keeps = args.window or WINDOWS, args.keep or KEEPS
    Path(args.work).mkdir(parents=True, exist_ok=True)
    with open_checkpoint(args.model) as checkpoint:
        bench = Bench(args, checkpoint)
        {"bases": bases_table, "calibration": calibration_table}[args.table](bench)
    if args.out:
        Path(args.out).write_text(json.dumps({"arguments": vars(args), "rows": bench.rows}, indent=1))


if __name__ == "__main__":
    main()
