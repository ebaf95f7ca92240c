"""`kvcompress compare` with every method on several models and kinds of text, in processes side by side.

    python recipes/compare_texts.py --model smollm2=DIR --model gemma3=DIR --text wikipedia=FILE --text book=FILE \
        --out WORK [--processes 12] [--max-windows 8]

Each (model, text, family of methods) is a process that runs `kvcompress compare`; each model is calibrated once before.
Run again, it measures what is missing. When a text's processes are done, their cells are joined: WORK/MODEL/TEXT has
compare.json, compare.md and, where the charting library is, the page and the figures. WORK/summary.md sets all texts
side by side and names every place where another method has fewer bytes and a lower ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvcompress.checkpoint.writer import atomic_file
from kvcompress.evaluate.compare_document import joined
from kvcompress.report.comparison import name_of, verdict_in_words
from kvcompress.report.stored_comparison import COMPARISON_FILE, read_comparison

#: Methods that share what they need are measured by one process; those that need the moments wait for them.
FAMILIES = {
    "formats": "fp8,turboquant,per-token-head,fp4,quanto",
    "blocks": "kivi,xkv",
    "kq-svd": "kq-svd",
    "ours": "default",
    "published": "kvtc,kvtc-deflate,palu,mea-half",
    "hqq": "hqq",
}
_CALIBRATED = ("ours", "published")
#: In which order their cells stand in tables.
_SHOWN = (*_CALIBRATED, "kq-svd", "blocks", "hqq", "formats")
_KVCOMPRESS = [sys.executable, "-c", "from kvcompress_cli.app import main; main()"]


@dataclass(frozen=True)
class Part:
    """One process: a family of methods on one text with one model."""

    model: str
    text: str
    family: str

    def directory(self, out: Path) -> Path:
        return out / self.model / ".parts" / self.text / self.family


def main() -> None:
    args = _arguments()
    models, texts = _named(args.model), _named(args.text)
    parts = [Part(m, t, f) for t in texts for f in args.families.split(",") for m in models]
    # hqq searches for its zeros, which takes as long as all others together: on further texts it comes last
    parts.sort(key=lambda part: part.family == "hqq" and part.text != next(iter(texts)))
    started = time.monotonic()
    with ThreadPoolExecutor(args.processes) as pool:
        moments = {name: pool.submit(_calibrate, path, args.out / name, args) for name, path in models.items()}
        done = {
            part: pool.submit(_measure, part, models[part.model], texts[part.text], moments[part.model], args)
            for part in parts
        }
        for part, future in done.items():
            print(f"{time.monotonic() - started:6.0f} s  {part.model} {part.text} {part.family}: {future.result()}")
            _join(args.out, part.model, part.text)  # what there is, in case that this is stopped
    summary = summary_table(args.out, list(models), list(texts))
    (args.out / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", default="0.49,0.25,0.125,0.0625")
    parser.add_argument("--max-windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--families", default=",".join(FAMILIES), help="only some of these")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    return parser.parse_args()


def _named(given: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in given)


def _calibrate(model: str, directory: Path, args: argparse.Namespace) -> Path:
    """Return the file of a model's moments, as `compare` looks for it in each of its directories."""
    directory.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, torch; from pathlib import Path; from kvcompress.options import CompressOptions;"
        "from kvcompress.calibration.calibrate import obtain_moments;"
        "from kvcompress.checkpoint.reader import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]) as checkpoint:\n"
        "    obtain_moments(checkpoint, Path(sys.argv[2]) / 'moments', "
        "CompressOptions(tokens=int(sys.argv[3]), seq_len=int(sys.argv[4])), "
        "device='cuda' if torch.cuda.is_available() else 'cpu', dtype='float32', resume=True)\n"
    )
    command = [sys.executable, "-c", code, model, str(directory), str(args.tokens), str(args.seq_len)]
    with (directory / "calibration.log").open("w") as log:
        subprocess.run(command, check=True, env=_environment(args), stdout=log, stderr=log)
    return next(directory.glob("kvcompress-moments-*.safetensors"))


def _measure(part: Part, model: str, text: str, moments: Future[Path], args: argparse.Namespace) -> str:
    """Run one part and return how it ended."""
    directory = part.directory(args.out)
    directory.mkdir(parents=True, exist_ok=True)
    if part.family in _CALIBRATED:
        file = moments.result()
        if not (directory / file.name).exists():
            os.link(file, directory / file.name)
    command = [*_KVCOMPRESS, "compare", model, "--text", text]
    command += ["--methods", FAMILIES[part.family], "--keep", args.keep, "--out", str(directory)]
    command += ["--max-windows", str(args.max_windows), "--seq-len", str(args.seq_len), "--tokens", str(args.tokens)]
    with (directory / "log.txt").open("w") as log:
        code = subprocess.run(command, env=_environment(args), stdout=log, stderr=log, check=False).returncode
    return "done" if code == 0 else f"rc {code}: {(directory / 'log.txt').read_text().strip().splitlines()[-1:]}"


def _environment(args: argparse.Namespace) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}


def _join(out: Path, model: str, text: str) -> None:
    """Write the comparison of all finished parts of a text, drawn where the charting library is."""
    files = [Part(model, text, family).directory(out) / COMPARISON_FILE for family in _SHOWN]
    found = [read_comparison(file) for file in files if file.is_file()]
    if not found:
        return
    target = out / model / text
    target.mkdir(parents=True, exist_ok=True)
    with atomic_file(target / COMPARISON_FILE) as scratch:
        scratch.write_text(json.dumps(joined(found), indent=1) + "\n", encoding="utf-8")
    command = [*_KVCOMPRESS, "compare", "--redraw", "--out", str(target), "--json"]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)


def summary_table(out: Path, models: list[str], texts: list[str]) -> str:
    """Return a Markdown table for each model: bytes and the ratio on every text, and who is ahead of us where."""
    lines = []
    for model in models:
        files = {text: out / model / text / COMPARISON_FILE for text in texts}
        documents = {text: read_comparison(file) for text, file in files.items() if file.is_file()}
        if not documents:
            continue
        cells = {text: {name_of(c): c for c in d["cells"] if "ratio" in c} for text, d in documents.items()}
        machine = next(iter(documents.values()))["machine"]["device"]
        lines += [f"## {model} ({machine})", "", f"| method | bytes a token | left | {' | '.join(documents)} |"]
        lines.append("|---|" + "---:|" * (2 + len(documents)))
        for name in dict.fromkeys(name for found in cells.values() for name in found):
            rows = [found.get(name) for found in cells.values()]
            shown = next(row for row in rows if row)
            ratios = " | ".join("" if row is None else f"{row['ratio']:.4f}" for row in rows)
            lines.append(f"| {name} | {shown['bytes_per_token']:,.0f} | {shown['keep']:.1%} | {ratios} |")
        lines.append("")
        for text, document in documents.items():
            ahead = [v for v in document["verdicts"]["ratio"] if v["verdict"] == "ahead"]
            said = "; ".join(f"{name_of(v)}: {verdict_in_words(v)}" for v in ahead)
            lines.append(f"- {text}: {said or 'no method has fewer bytes and a lower ratio than one of our points'}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
