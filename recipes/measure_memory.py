"""Measure what a compressed cache saves, from outside: the resident memory of a process that generates.

    python recipes/measure_memory.py OUT --text BOOK [--base MODEL] [--prompt-tokens 6000] [--new-tokens 2000]

Two processes generate greedily from the same prompt in float32, one with transformers' DynamicCache, one with the
compressed cache. This process watches their resident memory (psutil) and compares the fall of its peak,
above what the loaded model takes, with what the plan claims. Peaks are given for the whole run, the prompt included,
and for the generation after it, where the cache is at its largest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CACHES = ("dynamic", "compressed")


def generate(args: argparse.Namespace) -> None:
    """Run in a process of its own: say on stdout when the model is loaded, when the prompt is read and the end."""
    import torch

    import kvcompress
    from kvcompress.checkpoint.tokenizer import load_tokenizer

    model = kvcompress.load(args.output, base=args.base, dtype=torch.float32)
    whole = (Path(args.output) / "config.json").is_file()
    tokenizer = load_tokenizer(Path(args.output if whole else args.base))
    if args.cache == "dynamic":
        kvcompress.detach(model)
    text = Path(args.text).read_text(encoding="utf-8")[: 20 * args.prompt_tokens]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][: args.prompt_tokens]])
    with torch.no_grad():
        model(ids[:, :64])  # what the libraries allocate once
        print("loaded", flush=True)
        output = model(ids, logits_to_keep=1)
        cache, token = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        print("prompt read", flush=True)
        for i in range(args.new_tokens - 1):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            if i % 100 == 99:
                print(f"{i + 1} tokens", flush=True)
    print(f"end {cache.get_seq_length()}", flush=True)


def watch(args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Return {loaded, peak, peak_generating} of the resident memory in bytes, tokens in the cache, and seconds."""
    import psutil

    command = [sys.executable, __file__, args.output, "--text", args.text, "--cache", cache]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    command += ["--base", args.base] if args.base else []
    # Freed tensors go back to the system at once, so that resident memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    resident, phase = psutil.Process(process.pid), {"name": "start"}
    found: dict[str, Any] = {"cache": cache, "loaded": 0, "peak": 0, "peak_generating": 0}

    def sample() -> None:
        while process.poll() is None:
            try:
                now = resident.memory_info().rss
            except psutil.NoSuchProcess:
                return
            if phase["name"] != "start":
                found["peak"] = max(found["peak"], now)
            if phase["name"] == "generating":
                found["peak_generating"] = max(found["peak_generating"], now)
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for line in process.stdout:
        if line.startswith("loaded"):
            found["loaded"] = resident.memory_info().rss
            phase["name"] = "prompt"
        elif line.startswith("prompt read"):
            phase["name"] = "generating"
        elif line.startswith("end"):
            found["tokens"] = int(line.split()[1])
        print(f"{cache}: {line.strip()}", file=sys.stderr, flush=True)
    sampler.join()
    if process.wait():
        raise SystemExit(f"the process with the {cache} cache failed ({process.returncode}).")
    return found | {"seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--text", required=True)
    parser.add_argument("--base", help="the original checkpoint, for an output that holds only maps")
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=2000)
    parser.add_argument("--cache", choices=CACHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cache:
        generate(args)
        return
    from kvcompress.plan import Plan

    plan = Plan.load(Path(args.output))
    with ThreadPoolExecutor() as pool:  # side by side: memory is measured here, not time
        runs = dict(zip(CACHES, pool.map(lambda cache: watch(args, cache), CACHES), strict=True))
    n_tokens = runs["dynamic"]["tokens"]
    whole = n_tokens * sum(s.width for s in plan.sites) * 4
    claimed = whole - plan.cache_bytes(n_tokens, exact_number_bytes=4)
    document: dict[str, Any] = {"runs": runs, "tokens": n_tokens, "dynamic_bytes": whole, "claimed_fall": claimed}
    for name in ("peak", "peak_generating"):
        above = {cache: run[name] - run["loaded"] for cache, run in runs.items()}
        fall = above["dynamic"] - above["compressed"]
        document[name] = {"above_the_model": above, "fall": fall, "share_of_the_claim": fall / claimed}
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
