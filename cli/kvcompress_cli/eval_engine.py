"""`kvcompress eval --engine vllm`: the engine against the run time in transformers, over the same compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress_cli.eval_options import EvalOptions
    from kvcompress_cli.loading import Loaded


def load_beside(output: Path, *, engine: str, base: str | None, device: str, dtype: str) -> Loaded:
    """Return the output in transformers, beside which the engine runs it.

    Raises OptionError for another engine, for maps alone, or without vLLM.
    """
    from kvcompress.errors import OptionError
    from kvcompress.vllm.plugin import installed_version
    from kvcompress_cli.loading import load_compressed

    if engine != "vllm":
        raise OptionError(f"--engine {engine} is unknown. Known: vllm.")
    if not (output / "config.json").is_file():
        raise OptionError(f"{output} holds maps alone; --engine runs a whole checkpoint. Compress without --maps-only.")
    installed_version()
    return load_compressed(output, base=base, device=device, dtype=dtype, with_original=False)


def show_engine(loaded: Loaded, output: Path, options: EvalOptions, *, json: bool) -> None:
    """Measure on the text, and print."""
    from kvcompress.evaluate.engine import evaluate_engine

    found = evaluate_engine(
        loaded.model, loaded.tokenizer, output, str(options.text),
        n_prompts=options.prompts or 8, prompt_tokens=options.prompt_tokens or 512,
        new_tokens=options.new_tokens or 128, n_windows=options.max_windows or 2, seq_len=options.seq_len or 512,
    )  # fmt: skip
    if json:
        terminal.print_json(found.to_json())
        return
    grid = terminal.facts()
    protocol = found.protocol
    of_how_many = f"{protocol['prompts']} x {protocol['new_tokens']}"
    grid.add_row("same next token", f"{found.same_token:.2%} of {of_how_many} tokens")
    grid.add_row("by itself, up to the first other one", f"{found.same_text:.2%}")
    grid.add_row("prompts continued alike", f"{found.identical:.0%}")
    grid.add_row(
        "perplexity, decoded token by token",
        f"{found.perplexity:.4f} in vLLM, {found.run_time_perplexity:.4f} in transformers "
        f"({protocol['windows']} windows of {protocol['seq_len']}, {protocol['dtype']})",
    )
    terminal.stdout().print(grid)
