"""`kvcompress export`: a folded output -> an ordinary checkpoint or file for stock engines."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.export.export import ExportResult
    from kvcompress.export.verify import EngineCheck

_SERVE = {
    "hf": ("vllm serve {out}", "transformers serve {out}"),
    "gguf": ("llama-server -m {out}",),
    "vllm-decilm": ("vllm serve {out} --trust-remote-code",),
}
_SAME_TEXT = {True: "cuts the text into the same tokens", False: "cuts the text into OTHER tokens"}


def export(
    command: typer.Context,
    folded: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A directory made by kvcompress compress --folded.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR|FILE", help="What to write; for gguf a file.")],
    to: Annotated[
        str, typer.Option(help="hf, gguf, or vllm-decilm (layers may cache different numbers of heads).")
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16; for gguf also q8_0; auto is the checkpoint's own.")
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Run it in every engine that is installed, against the folded model.")
    ] = False,
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help="Text for --verify.")] = "builtin:prose",
    engine_python: Annotated[
        list[str] | None,
        typer.Option(metavar="PYTHON", help="The Python of another environment with engines. May be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: flags.Json = False,
) -> None:
    """Write a folded output as a checkpoint that engines run with no code of kvcompress.

    --verify compares logits and greedy tokens with the folded model, in float32, and prints the cache bytes that
    the engine itself reports; only with --dtype float32 (f32) must they agree.
    """
    from kvcompress.export.export import export as export_model

    if not verify:
        flags.refuse_idle(command, ("text", "engine_python"), "without --verify")
    result = export_model(folded, output, to=to, dtype=dtype, force=force)
    checks: list[EngineCheck] = []
    missing: list[str] = []
    if verify:
        from kvcompress.export import verify as verification

        checks, missing = verification.verify(folded, result, text=text, pythons=engine_python or ())
    if json:
        terminal.print_json(result.to_json() | ({"verify": [c.to_json() for c in checks]} if verify else {}))
    else:
        _print(result)
        _print_checks(checks, missing)
    if verify:
        verification.failures(checks)


def _print(result: ExportResult) -> None:
    from kvcompress.export.card import extra_weights

    figures = result.to_json()
    heads = sorted(set(result.n_kv_heads))
    shape = str(heads[0]) if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    cache = figures["cache_bytes_per_token"]
    grid = terminal.facts()
    grid.add_row("cached heads", f"{shape} of {result.head_dim} in a layer")
    grid.add_row("cache", f"{cache['exported']:,} of {cache['original']:,} bytes a token ({figures['keep']:.1%})")
    grid.add_row("weights", f"{terminal.size(result.weight_bytes)} in {result.dtype}")
    grid.add_row("", extra_weights(figures, figures["weight_bytes"]))
    typer.echo(f"wrote {result.output} ({result.target})\n")
    terminal.stdout().print(grid)
    typer.echo("\nThe fold was not trained: measure its quality with kvcompress eval before you serve it.")
    for command in _SERVE[result.target]:
        typer.echo(command.format(out=shlex.quote(str(result.output))))


def _print_checks(checks: list[EngineCheck], missing: list[str]) -> None:
    if not checks and not missing:
        return
    typer.echo("")
    for check in checks:
        grid = terminal.facts()
        grid.add_row(check.engine, check.version or "did not run")
        for name, value in _findings(check).items():
            grid.add_row(f"  {name}", value)
        terminal.stdout().print(grid)
    for name in missing:
        typer.echo(f"{name}: not installed here; name an environment that has it with --engine-python.")


def _findings(check: EngineCheck) -> dict[str, Any]:
    if check.error:
        return {"error": check.error}
    verdict = {True: "passed", False: "FAILED", None: "weights are rounded: differences are no failure"}
    return {
        "logits": f"differ by at most {check.max_logit_difference:.2g} over {check.n_positions} positions",
        "greedy tokens": f"{check.same_tokens} of {check.n_generate} identical",
        "cache": f"{check.bytes_per_token:,.0f} bytes a token in float32, {check.claimed:,} claimed",
        "it reports": check.said,
        **({} if check.same_tokenization is None else {"tokenizer": _SAME_TEXT[check.same_tokenization]}),
        "verdict": verdict[check.passed],
    }
