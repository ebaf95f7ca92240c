"""`kvcompress heal`: an output of compress, trained towards the uncompressed model, written as an output of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.heal.options import PRECISIONS, TRAINED, HealOptions, load_heal_recipe, with_heal_overrides
from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.heal.heal import HealResult

_DEFAULTS = HealOptions()
_TRAINING = "Training"
_TEXT = "Text"
_FORM = "Output"


def _option(name: str, help: str, panel: str, **settings: Any) -> Any:
    """Return an option for a field of HealOptions: not given means the recipe's value, or the default shown."""
    default = getattr(_DEFAULTS, name)
    shown = {"show_default": str(default)} if default is not None and default is not False else {}
    return typer.Option(help=help, rich_help_panel=panel, **(shown | settings))


def heal(
    directory: flags.CompressedDirectory,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="HEALED", help="The directory to write.")],
    train: Annotated[
        str | None,
        _option("train", f"What is trained. One of {', '.join(TRAINED)}; the last two for folded outputs.", _TRAINING),
    ] = None,
    tokens: Annotated[int | None, _option("tokens", "Tokens to train on.", _TRAINING)] = None,
    batch: Annotated[int | None, _option("batch", "Windows in a step, over all devices.", _TRAINING)] = None,
    device_batch: Annotated[
        int | None, _option("device_batch", "Windows that one device takes at once.", _TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None, _option("learning_rate", "Peak rate of weights.", _TRAINING, show_default="5e-4")
    ] = None,
    maps_rate: Annotated[
        float | None, _option("maps_rate", "Peak rate of maps, relative to the codec's own error.", _TRAINING)
    ] = None,
    warmup: Annotated[float | None, _option("warmup", "Share of steps in which rates rise.", _TRAINING)] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "Decay of trained matrices.", _TRAINING)] = None,
    kl_loss: Annotated[
        float | None, _option("kl_loss", "Weight of the distance of next-token distributions.", _TRAINING)
    ] = None,
    hidden_loss: Annotated[
        float | None, _option("hidden_loss", "Weight of the distance of final hidden states.", _TRAINING)
    ] = None,
    text_loss: Annotated[float | None, _option("text_loss", "Weight of the text's own loss.", _TRAINING)] = None,
    head_norm: Annotated[
        bool | None,
        _option("head_norm", "Train a norm of every head's output (folded outputs; not exported).", _TRAINING),
    ] = None,
    evaluations: Annotated[
        int | None, _option("evaluations", "How often held-out loss is measured.", _TRAINING)
    ] = None,
    patience: Annotated[
        int | None, _option("patience", "Stop after this many of them without a new best.", _TRAINING)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("gradient_checkpointing", "Recompute layers: less memory, more time.", _TRAINING)
    ] = None,
    compile: Annotated[
        bool | None,
        _option("compile", "Compile the layers first: more tokens a second (folded outputs).", _TRAINING),
    ] = None,
    deterministic: Annotated[
        bool | None, _option("deterministic", "The same bits every time, on a GPU too; slower there.", _TRAINING)
    ] = None,
    precision: Annotated[
        str | None, _option("precision", f"One of {', '.join(PRECISIONS)}; auto is bf16 on a GPU.", _TRAINING)
    ] = None,
    seed: Annotated[int | None, _option("seed", "Seed of the order of the text.", _TRAINING)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a training that was killed.", rich_help_panel=_TRAINING)
    ] = False,
    text: Annotated[
        list[str] | None,
        _option(
            "text",
            "A text file, JSONL, directory, datasets id, builtin:prose, builtin:code or self. Repeat it: each is a "
            "kind of text that must not get worse.",
            _TEXT,
            metavar="TEXT",
            show_default=", ".join(_DEFAULTS.text),
        ),
    ] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Tokens in a window of text.", _TEXT)] = None,
    held_out: Annotated[
        int | None, _option("held_out", "Windows of each text kept out of the training.", _TEXT)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML file with these choices; flags override it.", metavar="R.toml", rich_help_panel=_FORM),
    ] = None,
    base: flags.Base = None,
    force: Annotated[bool, typer.Option("--force", help="Replace HEALED if it exists.", rich_help_panel=_FORM)] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    json: flags.Json = False,
) -> None:
    """Train OUT to do what the uncompressed model does, and write it to HEALED: same format, same bytes a token.

    Distillation with the compressed cache seen as at run time. The best weights by held-out loss are kept; where none
    are better on every text, the output is written as it was. For several GPUs: torchrun --no-python kvcompress heal.
    """
    chosen = {
        name: value
        for name, value in locals().items()
        if name in HealOptions.__dataclass_fields__ and name not in ("text",)
    }
    chosen["text"] = tuple(text) if text else None
    options = load_heal_recipe(recipe, **chosen) if recipe else with_heal_overrides(_DEFAULTS, **chosen)
    result = run(directory, output, options, base=base, device=device, resume=resume, force=force)
    if result is None:
        return
    if json:
        terminal.print_json({"output": str(result.output), **result.stage})
    else:
        _print(result)


def run(directory: Path, output: Path, options: HealOptions, **settings: Any) -> HealResult | None:
    """Return heal()'s result, with progress on stderr; None in a process that does not write."""
    from kvcompress.checkpoint.writer import check_target

    check_target(output, force=settings["force"])  # before the seconds that importing torch takes
    from kvcompress.heal.heal import heal as heal_output
    from kvcompress.heal.heal import is_main_process
    from kvcompress_cli.progress import training_progress

    with training_progress() as progress:
        result = heal_output(directory, output, options, progress=progress, **settings)
    return result if is_main_process() else None


def _print(result: HealResult) -> None:
    from kvcompress_cli.report import print_healing

    typer.echo(f"wrote {result.output}")
    print_healing(terminal.stdout(), [result.stage])
    typer.echo(f"\nkvcompress eval {shlex.quote(str(result.output))} --text FILE")
