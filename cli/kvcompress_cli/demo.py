"""`kvcompress demo`: the bundled model, compressed, reported, evaluated and sampled, in under a minute on two cores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.options import CompressOptions
from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.evaluate.perplexity import Evaluation
    from kvcompress_cli.generate import Generation

_SEQ_LEN = 1024
_CALIBRATION_TOKENS = 16 * _SEQ_LEN
_EVAL_WINDOWS = 4
#: Characters of prose set aside for the evaluation: more than its windows hold, at up to 8 characters a token.
_HELD_OUT_CHARS = 8 * _EVAL_WINDOWS * _SEQ_LEN
_CALIBRATION_CHARS = 500_000
_PROMPT = "The old man looked at the sea and"
#: Enough for the text to leave the recent window, so that most of it is really read back compressed.
_NEW_TOKENS = 192
_TEXTS = (
    "calibrated on prose and code that come with Python, evaluated on prose set aside from it "
    "(the first documents of builtin:prose)"
)


@dataclass(frozen=True)
class Samples:
    """The same prompt, continued greedily before and after compression."""

    original: Generation
    compressed: Generation


def demo(
    keep: Annotated[float, typer.Option(help="Share of the cache's bytes that remains.")] = CompressOptions().keep,
    json: flags.Json = False,
) -> None:
    """Compress the small model that comes with kvcompress, report, evaluate, and show a sample before and after.

    It needs no network and no text, and everything it writes is removed again.
    """

    options = CompressOptions(keep=keep, tokens=_CALIBRATION_TOKENS, seq_len=_SEQ_LEN)
    started = time.monotonic()
    with bundled_model() as model, TemporaryDirectory(prefix="kvcompress-demo-") as scratch:
        document = run(model, Path(scratch), options, quiet=json)
    document["seconds"] = time.monotonic() - started
    if json:
        terminal.print_json(document)
    else:
        typer.echo(f"\n{_TEXTS}\n{document['seconds']:.1f} s in all. Next: kvcompress compress MODEL OUT --keep {keep}")


@contextmanager
def bundled_model() -> Iterator[Path]:
    """Yield the directory of the model that comes with the package."""
    from importlib.resources import as_file, files

    with as_file(files("kvcompress") / "assets" / "demo") as directory:
        yield directory


def run(model: Path, scratch: Path, options: Any, *, quiet: bool) -> dict[str, Any]:
    """Return what --json prints, less the seconds; print each step's result unless quiet."""
    from dataclasses import replace

    from kvcompress.calibration.text import CODE
    from kvcompress.report.stored import read_report
    from kvcompress_cli.compression import result_document
    from kvcompress_cli.compression import run as compress
    from kvcompress_cli.eval_perplexity import measure, show
    from kvcompress_cli.loading import load_compressed
    from kvcompress_cli.report import print_report

    held_out, rest = split_prose(scratch)
    options = replace(options, calibration=(str(rest), CODE))
    output = scratch / "compressed"
    result = compress(str(model), output, options, device="cpu")
    if not quiet:
        typer.echo(f"compressed the bundled model in {result.seconds:.1f} s\n")
        print_report(read_report(output))
    loaded = load_compressed(output, base=None, device="cpu", dtype="auto", with_original=True)
    evaluation = measure(loaded, str(held_out), seq_len=options.seq_len, max_windows=_EVAL_WINDOWS)
    if not quiet:
        typer.echo("")
        show(evaluation)
    # in the checkpoint's own dtype, so that the measured bytes of both caches can be compared
    samples = sample_both(load_compressed(output, base=None, device="cpu", dtype=result.plan.dtype))
    if not quiet:
        _print_samples(samples)
    return _document(result_document(result), evaluation, samples)


def split_prose(scratch: Path) -> tuple[Path, Path]:
    """Return two text files of the built-in prose, to evaluate on and to calibrate on, with no paragraph in common.

    Its topics repeat each other in places, so that whole documents would not keep them apart.
    """
    from kvcompress.calibration.text import PROSE, documents

    paragraphs = (part.strip("\n") for document in documents(PROSE) for part in document.split("\n\n"))
    held_out = list(_first(paragraphs, _HELD_OUT_CHARS))
    seen = set(held_out)
    rest = _first((paragraph for paragraph in paragraphs if paragraph not in seen), _CALIBRATION_CHARS)
    files = scratch / "prose-held-out.txt", scratch / "prose.txt"
    for file, part in zip(files, (held_out, rest), strict=True):
        file.write_text("\n\n".join(part), encoding="utf-8")
    return files


def _first(texts: Iterator[str], n_chars: int) -> Iterator[str]:
    """Yield texts until they hold n_chars characters."""
    for text in texts:
        yield text
        n_chars -= len(text)
        if n_chars <= 0:
            return


def sample_both(loaded: Any) -> Samples:
    """Return the same prompt continued with the compressed cache and, after detaching it, with the model's own."""
    from kvcompress import detach
    from kvcompress_cli.generate import continue_prompt

    compressed = continue_prompt(loaded, _PROMPT, max_new_tokens=_NEW_TOKENS)
    detach(loaded.model)
    return Samples(continue_prompt(loaded, _PROMPT, max_new_tokens=_NEW_TOKENS), compressed)


def _document(compression: dict[str, Any], evaluation: Evaluation, samples: Samples) -> dict[str, Any]:
    del compression["output"], compression["seconds"]  # the output is gone again
    return compression | {
        "texts": _TEXTS,
        "eval": evaluation.to_json(),
        "sample": {"prompt": _PROMPT, "original": asdict(samples.original), "compressed": asdict(samples.compressed)},
    }


def _print_samples(samples: Samples) -> None:
    from rich.markup import escape

    console = terminal.stdout()
    for name, sample in (("before", samples.original), ("after", samples.compressed)):
        cache = terminal.size(sample.measured_bytes)
        console.print(f"\n[bold]{name}[/bold] ({sample.new_tokens} tokens, a cache of {cache} measured)")
        console.print(f"[dim]{escape(_PROMPT)}[/dim]{escape(sample.text)}", soft_wrap=True)
