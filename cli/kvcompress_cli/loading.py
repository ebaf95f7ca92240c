"""Where a compressed checkpoint runs, and its model, tokenizer and original, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.errors import CheckpointError, KVCompressError, OptionError
from kvcompress.model.model_spec import DTYPE_BYTES
from kvcompress.plan import Plan
from kvcompress.runtime.output import original_of


@dataclass(frozen=True)
class Loaded:
    """A compressed model, ready to run. `original` is there where it was asked for and the form needs one."""

    model: Any
    tokenizer: Any
    plan: Plan
    original: Any | None


def resolve_device(device: str) -> str:
    """Return a device that works here: for auto, a GPU if there is one. Raises OptionError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device '{device}' does not work here: {_first_line(error)}. Choose auto or cpu.") from error
    return device


def check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPE_BYTES):
        raise OptionError(f"dtype '{dtype}' is unknown. Choose from auto, {', '.join(DTYPE_BYTES)}.")


def resolve_dtype(dtype: str, device: str, own: str) -> torch.dtype:
    """Return the dtype to run in: for auto, float32 on a CPU and `own` (the checkpoint's) elsewhere."""
    check_dtype(dtype)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else own
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def load_compressed(
    directory: Path, *, base: str | None, device: str, dtype: str, with_original: bool = False
) -> Loaded:
    """Return the model of a compressed checkpoint, its tokenizer and, for a folded one if asked, its original.

    Raises a KVCompressError where anything is missing or does not fit.
    """
    from kvcompress.runtime.load import load  # here: with transformers, which a device's name does not need

    plan = Plan.load(directory)
    device = resolve_device(device)
    run_dtype = resolve_dtype(dtype, device, plan.dtype)
    whole = (directory / "config.json").is_file()
    needs_original = with_original and plan.form == "folded"
    with ExitStack() as stack:
        path = stack.enter_context(original_of(directory, plan, base)) if needs_original or not whole else None
        with _explained(directory):
            model = load(directory, base=path, dtype=run_dtype, device=device)
            tokenizer = load_tokenizer(directory if whole or path is None else path)
            original = None
            if needs_original:
                original = load_weights(path, dtype=run_dtype).to(device).eval()
    return Loaded(model, tokenizer, plan, original)


@contextmanager
def opened_model(source: str, *, device: str, dtype: str) -> Iterator[tuple[Checkpoint, Any, Any]]:
    """Yield (checkpoint, model, tokenizer) of an uncompressed checkpoint. Raises a KVCompressError."""
    device = resolve_device(device)
    check_dtype(dtype)
    with open_checkpoint(source) as checkpoint:
        run_dtype = resolve_dtype(dtype, device, checkpoint.spec.dtype)
        with _explained(checkpoint.path):
            tokenizer = load_tokenizer(checkpoint.path)
            model = load_weights(checkpoint.path, dtype=run_dtype).to(device).eval()
        yield checkpoint, model, tokenizer


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn what transformers raises for missing or broken files into one clear CheckpointError."""
    try:
        yield
    except KVCompressError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
