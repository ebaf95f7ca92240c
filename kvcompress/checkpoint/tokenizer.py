"""A checkpoint's tokenizer, loaded by transformers, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions for a stranger's file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory} has no usable tokenizer: {reason}") from error


def start_tokens(tokenizer: Any) -> list[int]:
    """Return [BOS] where the tokenizer begins every text with it, as the model is then used to; else nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def windows_of(tokenizer: Any, ids: list[int], seq_len: int, most: int | None = None) -> Tensor:
    """Return the first windows [n, seq_len] of a stream of tokens, each begun as the tokenizer begins a text."""
    start = start_tokens(tokenizer)
    n_new = seq_len - len(start)
    n = min(len(ids) // n_new, len(ids) if most is None else most)
    windows = torch.tensor(ids[: n * n_new], dtype=torch.long).reshape(n, n_new)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(n, -1), windows], 1) if start else windows
