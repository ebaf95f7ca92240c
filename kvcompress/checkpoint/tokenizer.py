"""A checkpoint's tokenizer, loaded by transformers, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.checkpoint.headers import check_json_files
from kvcompress.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint directory. Raises CheckpointError if it has none that works."""
    from transformers import AutoTokenizer

    # Some versions of transformers build an empty tokenizer where there are no files.
    if not any((directory / name).is_file() for name in _FILES):
        raise CheckpointError(f"{directory} has no usable tokenizer: it holds none of {', '.join(_FILES)}.")
    check_json_files(directory)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises plain Exceptions for a stranger's file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory} has no usable tokenizer: {reason}") from error
