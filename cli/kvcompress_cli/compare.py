"""`kvcompress compare`: our method, published ones and peers' caches at every budget, on one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.options import CompressOptions
from kvcompress_cli import flags, sharing, terminal

_DEFAULTS = CompressOptions()
_KEEPS = "0.5,0.25,0.125,0.0625"
_METHODS = "default,palu,mea-half,kvtc,kvtc-deflate,kq-svd,xkv,kivi,hqq,quanto,fp8,turboquant,per-token-head,fp4"
_TEXT = "Calibration of our methods"


def compare(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A checkpoint directory, a .gguf file or a hub id.", show_default=False),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Text to compare on: a file, JSONL, directory or datasets id.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[str, typer.Option(metavar="K,K,...", help="Shares of the cache's bytes that remain.")] = _KEEPS,
    methods: Annotated[
        str,
        typer.Option(
            metavar="M,M,...",
            help="default, palu, mea-half, kvtc, kvtc-deflate, kq-svd, xkv, a recipe.toml; peers: kivi, hqq, "
            "quanto, fp8, turboquant, per-token-head, fp4, or one such as hqq-2bit.",
            show_default="all that are named here",
        ),
    ] = _METHODS,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where compare.json, compare.md and compare.html are written.")
    ] = Path("comparison"),
    seq_len: Annotated[
        int, typer.Option(min=16, help="Tokens in a window, of this text and of the calibration's.")
    ] = 2048,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many windows.", show_default="the whole text")
    ] = None,
    recent: Annotated[
        int, typer.Option(min=0, help="Latest tokens that stay exact in our methods.")
    ] = _DEFAULTS.recent,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that stay exact in our methods.")] = _DEFAULTS.sinks,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="As in kvcompress compress. Repeat it to mix texts.",
            rich_help_panel=_TEXT,
            show_default="texts of all kinds",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text to calibrate on.", rich_help_panel=_TEXT)
    ] = _DEFAULTS.tokens,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is sampled.", rich_help_panel=_TEXT)] = 0,
    device: flags.Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32 (peers store in the checkpoint's dtype all the same), bfloat16 or float16.")
    ] = "float32",
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Measure nothing: write the table and the page of DIR/compare.json anew.")
    ] = False,
    gpus: sharing.Gpus = None,
    ray: sharing.Ray = None,
    per_gpu: sharing.PerGpu = 1,
    json: flags.Json = False,
) -> None:
    """Compare methods at several budgets, and quantised caches that people use today, decode-faithful.

    Calibrates once. Finished cells are kept in DIR: the same command goes on where it was stopped.
    """
    if redraw:
        document = _read(out)
    else:
        shared = {"tokens": tokens, "seq_len": seq_len, "sinks": sinks, "recent": recent, "seed": seed}
        document = run(
            *_required(model, text),
            out,
            keeps=_numbers(keep),
            methods=tuple(m.strip() for m in methods.split(",") if m.strip()),
            options=CompressOptions(calibration=tuple(calibration or ()), **shared),
            max_windows=max_windows,
            device=device,
            dtype=dtype,
            shared=sharing.Sharing(gpus, ray, per_gpu),
        )
    written = ["compare.json", *_write(document, out)]
    if json:
        terminal.print_json(document)
    else:
        _print(document)
        typer.echo(f"\nwrote {', '.join(str(out / name) for name in written)}")


def _required(model: str | None, text: str | None) -> tuple[str, str]:
    from kvcompress.errors import OptionError

    if model is None or text is None:
        raise OptionError("a comparison needs a MODEL and a --text (or --redraw, for one that was measured before).")
    return model, text


def _read(out: Path) -> dict[str, Any]:
    from kvcompress.report.stored_comparison import COMPARISON_FILE, read_comparison

    return read_comparison(out / COMPARISON_FILE)


def _numbers(keep: str) -> tuple[float, ...]:
    from kvcompress.errors import OptionError

    try:
        return tuple(sorted({float(k) for k in keep.split(",")}, reverse=True))
    except ValueError as error:
        raise OptionError(f"--keep '{keep}' is no list of numbers such as {_KEEPS}.") from error


def run(
    model: str,
    text: str,
    out: Path,
    *,
    keeps: tuple[float, ...],
    methods: tuple[str, ...],
    options: CompressOptions,
    max_windows: int | None,
    device: str,
    dtype: str,
    shared: sharing.Sharing,
) -> dict[str, Any]:
    """Return the library's comparison, with progress on stderr."""
    shared.wake(device)  # before the seconds that importing torch takes
    from kvcompress.errors import OptionError
    from kvcompress_cli.loading import check_dtype, resolve_device
    from kvcompress_cli.progress import stage_progress

    check_dtype(dtype)
    if dtype == "auto":
        raise OptionError("compare runs every method in one dtype: name float32, bfloat16 or float16.")
    how: dict[str, Any] = {"device": resolve_device(device), "dtype": dtype}
    with shared.at_work(device) as workers, stage_progress() as progress:
        from kvcompress.evaluate.compare import Request  # here: workers import at the same time
        from kvcompress.evaluate.compare import compare as compare_methods

        request = Request(methods, keeps, text, options, options.seq_len, max_windows)
        return compare_methods(model, out, request, **how, workers=workers, progress=progress)


def _write(document: dict[str, Any], out: Path) -> list[str]:
    """Write the table, the page and its figure, and return their names; without the charting library the table."""
    from kvcompress.checkpoint.writer import atomic_file
    from kvcompress.errors import OptionError
    from kvcompress.report.comparison import comparison_table
    from kvcompress.report.comparison_page import comparison_page
    from kvcompress.report.pareto import pareto_svg

    files = {"compare.md": comparison_table(document)}
    try:
        files["compare.html"] = comparison_page(document)
        files |= {f"pareto-{name}.svg": pareto_svg(document, dark=name == "dark") for name in ("light", "dark")}
    except OptionError as error:
        typer.echo(f"note: no page: {error} Then: kvcompress compare --redraw --out {out}", err=True)
    for name, content in files.items():
        with atomic_file(out / name) as scratch:
            scratch.write_text(content, encoding="utf-8")
    return list(files)


def _print(document: dict[str, Any]) -> None:
    from kvcompress.report.comparison import headline, rows

    table = terminal.table("method", ">bytes", ">left", ">ratio", ">s.e.", ">KL", "against ours")
    table.columns[-1].no_wrap = False
    for row in rows(document):
        table.add_row(*row)
    terminal.stdout().print(table)
    typer.echo(headline(document))
