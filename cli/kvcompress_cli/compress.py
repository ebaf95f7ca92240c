"""`kvcompress compress`: a recipe and flags -> options -> a compressed checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.options import (
    DEFAULT_TURN,
    GROUPED,
    KEY_BASES,
    METRICS,
    POLICY_NAMES,
    VALUE_BASES,
    CompressOptions,
    load_recipe,
    with_overrides,
)
from kvcompress_cli import flags, sharing, terminal
from kvcompress_cli.report import search_table

if TYPE_CHECKING:
    from kvcompress.evaluate.max_ratio import Search
    from kvcompress.pipeline import CompressionResult

_DEFAULTS = CompressOptions()
_CACHE = "What is kept"
_TEXT = "Calibration"
_FORM = "Output"


def _option(name: str, help: str, panel: str, **settings: Any) -> Any:
    """Return an option for a field of CompressOptions: not given means the recipe's value, or the default shown."""
    default = getattr(_DEFAULTS, name)
    shown = {"show_default": str(default)} if default not in (None, ()) and default is not False else {}
    return typer.Option(help=help, rich_help_panel=panel, **(shown | settings))


def _one_of(choices: tuple[str, ...]) -> str:
    return f"One of {', '.join(choices)}."


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a .gguf file or a hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist yet.")],
    keep: Annotated[float | None, _option("keep", "Share of the cache's bytes that remains.", _CACHE)] = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(
            help="Instead of --keep: as little as has at most this perplexity, relative to the original's (1.005), "
            "measured on held-out windows of each kind of calibration text.",
            rich_help_panel=_CACHE,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="With --max-ratio: a text to measure on as well. Repeat it for more.",
            rich_help_panel=_CACHE,
            show_default=False,
        ),
    ] = None,
    key_basis: Annotated[
        str | None,
        _option("key_basis", _one_of((*KEY_BASES, GROUPED)), _CACHE, show_default="latent; grouped with --folded"),
    ] = None,
    value_basis: Annotated[str | None, _option("value_basis", _one_of(VALUE_BASES), _CACHE)] = None,
    group: Annotated[
        int | None,
        _option(
            "group",
            "KV heads in a block of latent.",
            _CACHE,
            show_default="what kernels take, maps within 3% of the weights",
        ),
    ] = None,
    per_group: Annotated[
        int | None, _option("per_group", "Virtual heads that a group of KV heads keeps, with grouped.", _CACHE)
    ] = None,
    band: Annotated[int | None, _option("band", "Channels of each head in a block of band.", _CACHE)] = None,
    turn: Annotated[
        int | None,
        _option(
            "turn",
            "Tokens whose keys are un-rotated by one position (band, per_head, latent).",
            _CACHE,
            show_default=f"{DEFAULT_TURN} for latent keys where GPU kernels take the layer, else 1",
        ),
    ] = None,
    policy: Annotated[
        str | None, _option("policy", f"How layers share the budget. {_one_of(POLICY_NAMES)}", _CACHE)
    ] = None,
    layers: Annotated[
        str | None, _option("layers", "Layers that policy middle compresses: half, deep or START:STOP.", _CACHE)
    ] = None,
    metric: Annotated[
        str | None,
        _option("metric", f"What an error costs. {_one_of(METRICS)} Predicted losses are nats with fisher.", _CACHE),
    ] = None,
    ranks_only: Annotated[
        bool | None, _option("ranks_only", "16-bit components, instead of bits shared out by the policy.", _CACHE)
    ] = None,
    sinks: Annotated[int | None, _option("sinks", "First tokens that stay exact.", _CACHE)] = None,
    recent: Annotated[int | None, _option("recent", "Latest tokens that stay exact.", _CACHE)] = None,
    calibration: Annotated[
        list[str] | None,
        _option(
            "calibration",
            "A text file, JSONL (texts or chats), directory, datasets id, self or builtin:NAME (essays, notes, "
            "dialogue, narrative, plays, prose, code). Repeat it to mix texts.",
            _TEXT,
            metavar="TEXT",
            show_default="all of builtin, and an eighth of self",
        ),
    ] = None,
    no_calibration: Annotated[
        bool,
        typer.Option("--no-calibration", help="Data-free, from the weights alone; far worse.", rich_help_panel=_TEXT),
    ] = False,
    tokens: Annotated[int | None, _option("tokens", "Tokens of text to calibrate on.", _TEXT)] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Tokens in a window of text.", _TEXT)] = None,
    seed: Annotated[int | None, _option("seed", "Seed of everything that is sampled.", _TEXT)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a calibration that was killed.", rich_help_panel=_TEXT)
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML file with these choices; flags override it.", metavar="R.toml", rich_help_panel=_FORM),
    ] = None,
    for_engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="vllm",
            help="Say what a token takes in this engine's pages; the default form is what it runs best.",
            rich_help_panel=_FORM,
            show_default=False,
        ),
    ] = None,
    folded: Annotated[
        bool | None,
        _option("folded", "Fold the encoders into k_proj and v_proj (grouped, head, share or frequency keys).", _FORM),
    ] = None,
    maps_only: Annotated[
        bool | None,
        _option("maps_only", "Write only the maps, to be attached to the original; the default above 60 GB.", _FORM),
    ] = None,
    refit: Annotated[
        bool | None,
        _option("refit", "Fit values to what queries read of them; where the model is at hand or below 4 GB.", _FORM),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.", rich_help_panel=_FORM)] = False,
    gpus: sharing.Gpus = None,
    ray: sharing.Ray = None,
    memory: sharing.Memory = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    json: flags.Json = False,
) -> None:
    """Compress the KV cache of MODEL and write the result to OUT, whole or not at all.

    What was measured on the text stays beside OUT, so that another budget or policy takes seconds.
    """
    chosen = {
        name: value
        for name, value in locals().items()
        if name in CompressOptions.__dataclass_fields__ and name not in ("calibration", "metric")
    }
    if for_engine is not None:
        _refuse(for_engine != "vllm", f"--for {for_engine} is unknown. Known: vllm.")
        _refuse(bool(folded), "--for vllm is for a coded cache. Leave out --folded, or export: kvcompress export.")
    options = choose_options(
        recipe, calibration=tuple(calibration or ()) or None, no_calibration=no_calibration, metric=metric, **chosen
    )
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "resume": resume,
        "force": force,
        "gpus": gpus,
        "ray": ray,
        "memory": memory,
    }
    search = None
    if max_ratio is None:
        _refuse(bool(text), "--text is what --max-ratio measures on. Give a --max-ratio, or leave it out.")
        result = run(model, output, options, **how)
    else:
        _refuse(keep is not None, "--max-ratio finds the keep. Leave out --keep.")
        result, search = search_keep(model, output, options, max_ratio, texts=tuple(text or ()), **how)
    if json:
        found = {} if search is None else {"search": search.to_json()}
        terminal.print_json(result_document(result) | found)
    else:
        _print(result)
        if for_engine is not None:
            print_for_engine(result)
        if search is not None:
            terminal.stdout().print(search_table(search.to_json()))


def print_for_engine(result: CompressionResult) -> None:
    """Say what a token takes in the engine's pages, padding, sinks and window included."""
    from kvcompress.vllm.pages import PoolBlock

    block = PoolBlock.of(result.plan)
    times = ", ".join(f"{block.times_the_tokens(n):.2f} at {terminal.tokens(n)}" for n in (2048, 32768))
    terminal.stdout().print(
        f"in vLLM: {block.bytes_per_token:,.0f} bytes a token in pages of {block.n_tokens} tokens, against "
        f"{block.own_bytes:,}; times the tokens that fit in sequences: {times}",
        highlight=False,
    )


def _refuse(condition: bool, message: str) -> None:
    from kvcompress.errors import OptionError

    if condition:
        raise OptionError(message)


def choose_options(
    recipe: Path | None,
    *,
    calibration: tuple[str, ...] | None,
    no_calibration: bool,
    metric: str | None,
    **chosen: Any,
) -> CompressOptions:
    """Return the recipe's options, or the defaults, with what was chosen (not None) on top. Raises OptionError."""
    from kvcompress.errors import OptionError

    if no_calibration and metric not in (None, "weights"):
        raise OptionError(f"--no-calibration cannot measure the metric {metric}. Leave out one of the two.")
    if chosen.get("folded") and recipe is None:
        chosen |= folded_defaults(chosen)
    overrides = chosen | {"calibration": calibration, "metric": "weights" if no_calibration else metric}
    options = load_recipe(recipe, **overrides) if recipe else with_overrides(CompressOptions(), **overrides)
    if calibration and options.metric == "weights":
        raise OptionError("metric weights reads no text, so --calibration would do nothing. Choose --metric fisher.")
    return options


def folded_defaults(chosen: dict[str, Any]) -> dict[str, Any]:
    """Return what --folded means where nothing else was chosen.

    Groups keep head_dim and, with as many in every layer, every engine takes their export. There is no exact window:
    every query sees every token compressed, so the gradients of all of them count.
    """
    defaults: dict[str, Any] = {"keep": 0.5, "recent": 0}
    if chosen.get("key_basis") is None:
        defaults |= {"key_basis": GROUPED, "policy": "uniform"}
    return {name: value for name, value in defaults.items() if chosen.get(name) is None}


def run(
    model: str,
    output: Path,
    options: CompressOptions,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    gpus: str | None = None,
    ray: str | None = None,
    memory: str | None = None,
) -> CompressionResult:
    """Return compress()'s result, with progress on stderr."""
    from kvcompress.checkpoint.writer import check_target

    check_target(output, force=force)  # before the seconds that importing torch takes
    from kvcompress.pipeline import compress as compress_checkpoint
    from kvcompress_cli.loading import check_dtype, resolve_device
    from kvcompress_cli.progress import stage_progress

    resolve_device(device)
    check_dtype(dtype)
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "resume": resume,
        "force": force,
        "memory": sharing.n_bytes(memory),
    }
    with sharing.at_work(gpus, ray, device) as workers, stage_progress() as progress:
        return compress_checkpoint(model, output, options, **how, workers=workers, progress=progress)


def search_keep(
    model: str, output: Path, options: CompressOptions, max_ratio: float, *, texts: tuple[str, ...], **how: Any
) -> tuple[CompressionResult, Search]:
    """Return compress_within()'s result, with progress on stderr."""
    from kvcompress.checkpoint.writer import check_target

    check_target(output, force=how["force"])
    from kvcompress.evaluate.max_ratio import compress_within
    from kvcompress_cli.loading import check_dtype, resolve_device
    from kvcompress_cli.progress import stage_progress

    resolve_device(how["device"])
    check_dtype(how["dtype"])
    gpus, ray = how.pop("gpus"), how.pop("ray")
    _refuse(how.pop("memory") is not None, "--max-ratio measures the whole model, so --memory cannot bound it.")
    with sharing.at_work(gpus, ray, how["device"]) as workers, stage_progress() as progress:
        how |= {"workers": workers, "progress": progress}
        return compress_within(model, output, options, max_ratio, texts=texts, **how)


def result_document(result: CompressionResult) -> dict[str, Any]:
    """Return what --json prints."""
    from kvcompress.report.document import summary

    figures = summary(result.plan)
    layers: list[dict[str, Any]] = [{"layer": i} for i in range(result.plan.n_layers)]
    for site in result.plan.sites:
        layers[site.layer][site.part] = {"rank": site.rank, "width": site.width}
    return {
        "keep": figures["keep"],
        "bytes_per_token": figures["bytes_per_token"],
        "predicted_loss_nats": figures["predicted_loss_nats"],
        "layers": layers,
        "seconds": result.seconds,
        "output": str(result.output),
    }


def _print(result: CompressionResult) -> None:
    from kvcompress.report.document import summary
    from kvcompress_cli.report import add_budget

    grid = terminal.facts()
    add_budget(grid, summary(result.plan))
    typer.echo(f"wrote {result.output} ({result.plan.form} form) in {result.seconds:.1f} s\n")
    terminal.stdout().print(grid)
    out = shlex.quote(str(result.output))
    typer.echo(f"\nkvcompress report {out}\nkvcompress eval {out} --text FILE")
    typer.echo(f'kvcompress generate {out} --prompt "Once upon a time"')
    if result.plan.form == "folded":
        typer.echo(f"kvcompress export {out} --to hf -o DIR")
