"""`kvcompress compress`: a recipe and flags -> options -> a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from kvcompress_cli import compression, flags, sharing, terminal
from kvcompress_cli.report import search_table

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
    per_gpu: sharing.PerGpu = 1,
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
        compression.check_runs_in_vllm(model)
    options = choose_options(
        recipe, calibration=tuple(calibration or ()) or None, no_calibration=no_calibration, metric=metric, **chosen
    )
    how: dict[str, Any] = {"device": device, "dtype": dtype, "resume": resume, "force": force}
    how["shared"] = sharing.Sharing(gpus, ray, per_gpu)
    search = None
    if max_ratio is None:
        _refuse(bool(text), "--text is what --max-ratio measures on. Give a --max-ratio, or leave it out.")
        result = compression.run(model, output, options, **how, memory=memory)
    else:
        _refuse(keep is not None, "--max-ratio finds the keep. Leave out --keep.")
        _refuse(memory is not None, "--max-ratio measures the whole model, so --memory cannot bound it.")
        result, search = compression.search_keep(model, output, options, max_ratio, texts=tuple(text or ()), **how)
    engine = {} if for_engine is None else {for_engine: compression.in_engine(result)}
    if json:
        found = {} if search is None else {"search": search.to_json()}
        terminal.print_json(compression.result_document(result) | engine | found)
    else:
        compression.print_result(result)
        if for_engine is not None:
            compression.print_in_engine(engine[for_engine])
        if search is not None:
            terminal.stdout().print(search_table(search.to_json()))


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
        raise OptionError(
            "--no-calibration, or metric weights, reads no text: --calibration would do nothing. Leave out one of them."
        )
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
