"""What `kvcompress eval` is asked for, and which of its evaluations that is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated and how; None where an option was not given."""

    text: str | None
    seq_len: int | None
    max_windows: int | None
    recent: int | None
    sinks: int | None
    tasks: str | None
    limit: int | None
    fewshot: int | None
    lengths: str | None
    depths: str | None
    prompts: int | None
    prompt_tokens: int | None
    new_tokens: int | None
    batch_size: int | None
    answers: Path | None
    cache: str | None


#: The evaluations that each option belongs to.
_BELONGS: dict[str, tuple[str, ...]] = {
    "text": ("--text", "--cache", "--retrieval", "--by-position", "--generation"),
    "seq_len": ("--text", "--cache", "--by-position"),
    "max_windows": ("--text", "--cache", "--by-position"),
    "recent": ("--text", "--cache", "--tasks", "--retrieval", "--by-position"),
    "sinks": ("--text", "--tasks", "--retrieval", "--by-position"),
    "tasks": ("--tasks",),
    "limit": ("--tasks",),
    "fewshot": ("--tasks",),
    "lengths": ("--retrieval",),
    "depths": ("--retrieval",),
    "prompts": ("--retrieval", "--generation"),
    "prompt_tokens": ("--generation",),
    "new_tokens": ("--generation",),
    "batch_size": ("--tasks", "--retrieval", "--generation"),
    "answers": ("--tasks", "--retrieval"),
}


#: What an engine takes, asked for a text or for tasks; its window is the plan's.
_IN_ENGINE: dict[str, tuple[str, ...]] = {
    "--text": ("text", "prompts", "prompt_tokens", "new_tokens", "max_windows", "seq_len"),
    "--tasks": ("tasks", "limit", "fewshot", "batch_size", "answers"),
}


def check_engine(options: EvalOptions, **flags: bool) -> None:
    """Raise OptionError for what would do nothing with --engine. flags: whether those beside the options were given."""
    from kvcompress.errors import OptionError

    if (options.text is None) == (options.tasks is None):
        raise OptionError("--engine needs --text, a text to continue and to decode, or --tasks. Name one of them.")
    mode = "--text" if options.tasks is None else "--tasks"
    given = [field.name for field in fields(options) if getattr(options, field.name) is not None]
    idle = [name for name in given if name not in _IN_ENGINE[mode]] + [name for name, on in flags.items() if on]
    if idle:
        raise OptionError(f"--{idle[0].replace('_', '-')} does nothing with --engine and {mode}. Leave it out.")


def mode_of(options: EvalOptions, *, retrieval: bool, by_position: bool, generation: bool) -> str:
    """Return which evaluation is asked for. Raises OptionError for none, for two, and for options of another."""
    from kvcompress.errors import OptionError

    asked = {
        "--cache": options.cache is not None,
        "--tasks": options.tasks is not None,
        "--retrieval": retrieval,
        "--by-position": by_position,
    }
    chosen = [name for name, on in (asked | {"--generation": generation}).items() if on]
    if len(chosen) > 1:
        raise OptionError(f"{chosen[0]} and {chosen[1]} are two evaluations. Run them one after the other.")
    mode = chosen[0] if chosen else "--text"
    if mode in ("--text", "--cache", "--by-position") and options.text is None:
        raise OptionError("nothing to evaluate on. Name a text with --text, or choose --tasks or --retrieval.")
    for name, modes in _BELONGS.items():
        if getattr(options, name) is not None and mode not in modes:
            with_mode = "perplexity (--text alone)" if mode == "--text" else mode
            raise OptionError(f"--{name.replace('_', '-')} does nothing with {with_mode}. Leave it out.")
    return mode
