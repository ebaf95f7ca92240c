"""The window, the sinks and the gains at long contexts, and retrieval: the tables of docs/measurements.md.

    python recipes/measure_long.py MODEL --text book.txt --length 2048:16 --length 8192:4 [--length 32768:2] --work DIR

Calibrates once (moments are kept in DIR), then measures each --keep at each length (LENGTH:WINDOWS of the text), the
smallest with other windows and sinks than those it was calibrated for, too, and finds keys in a book. --seq-len 8192
calibrates on as many tokens in longer windows. Prints a line as each figure comes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.perplexity import Original, evaluate_attached
from kvcompress.evaluate.retrieval import evaluate_retrieval
from kvcompress.evaluate.windows import Windows
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan, refit_values
from kvcompress.runtime.attach import attach_plan, detach

#: (recent, sinks): as calibrated first.
SETTINGS = ((64, 4), (128, 4), (256, 4), (64, 16))


def main() -> None:
    args = _arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.path)
        model: Any = load_weights(checkpoint.path, dtype="float32", device=device).eval()
        plans = {keep: _plan(checkpoint, model, keep, args) for keep in args.keep}
        print(f"{args.model} on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}", flush=True)
        for length in args.length:
            seq_len, n_windows = map(int, length.split(":"))
            original = Original(model, Windows.of(tokenizer, args.text, seq_len, n_windows), remember=True)
            for keep, (plan, maps) in plans.items():
                settings = SETTINGS[:1] if args.plain or keep > min(args.keep) else SETTINGS
                _windows_and_sinks(model, original, keep, plan, maps, settings)
            del original
        for length in args.retrieval or ():
            for keep, (plan, maps) in plans.items():
                _retrieval(model, tokenizer, keep, plan, maps, args, length)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", action="append", required=True, metavar="LENGTH:WINDOWS")
    parser.add_argument("--keep", action="append", type=float)
    parser.add_argument("--plain", action="store_true", help="no other windows and sinks")
    parser.add_argument("--retrieval", action="append", type=int, metavar="LENGTH")
    parser.add_argument("--book", help="where keys are hidden; by default the text")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--work", required=True)
    args = parser.parse_args()
    args.keep = args.keep or [0.125]
    return args


def _plan(checkpoint: Checkpoint, model: Any, keep: float, args: argparse.Namespace) -> Any:
    options, device = CompressOptions(keep=keep, tokens=args.tokens, seq_len=args.seq_len), model.device.type
    moments = obtain_moments(checkpoint, Path(args.work) / "x", options, device=device, dtype="float32")
    plan, maps, _ = make_plan(checkpoint, moments, options, device=device)
    refit_values(lambda: model, plan, maps, moments)
    return plan, maps


def _windows_and_sinks(
    model: Any, original: Original, keep: float, plan: Any, maps: Any, settings: Iterable[tuple[int, int]]
) -> None:
    n_windows, seq_len = original.windows.ids.shape
    for recent, sinks in settings:
        started = time.monotonic()
        attach_plan(model, plan, maps)
        try:
            found = evaluate_attached(model, original, recent=recent, sinks=sinks)
        finally:
            detach(model)
        error = 0.0 if found.ratio_standard_error is None else found.ratio_standard_error
        far = found.distance
        gains = "" if far is None else f" | {far.component_energy:.3f} | {far.gains_at_ends:.3f}"
        print(
            f"| {seq_len} x {n_windows} | {keep:g} | {recent} | {sinks} | {found.perplexity['original']:.3f} | "
            f"{found.perplexity['ratio']:.5f} | {error:.5f} | {1e3 * found.kl_nats:.2f}{gains} | "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )


def _retrieval(
    model: Any, tokenizer: Any, keep: float, plan: Any, maps: Any, args: argparse.Namespace, length: int
) -> None:
    attach_plan(model, plan, maps)
    try:
        book, started = args.book or args.text, time.monotonic()
        answers = Path(args.work) / "answers.jsonl"  # the original's serve all plans
        asked: dict[str, Any] = {"lengths": [length], "n_prompts": args.prompts, "batch_size": 1}
        found = evaluate_retrieval(model, tokenizer, book, **asked, answers=answers)
    finally:
        detach(model)
    for kind, paired in found.found.items():
        cells = [c for c in found.cells if c.kind == kind]
        n = sum(c.n for c in cells)
        sums = [
            sum(getattr(c, name) * c.n for c in cells) / n
            for name in ("original", "compressed", "original_logprob", "compressed_logprob")
        ]
        shares = f"{sums[0]:.1%} | {sums[1]:.1%} | {sums[2]:.3f} | {sums[3]:.3f}"
        took = f"{time.monotonic() - started:.1f} s"
        print(f"| {kind} | {length} | {keep:g} | {n} | {shares} | p {paired.p_value:.3f} | {took}", flush=True)


if __name__ == "__main__":
    main()
