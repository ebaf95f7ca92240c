"""The windows of a text that a model is evaluated on, and the digest by which the text is known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcompress.calibration.text import CHARS_PER_TOKEN, documents
from kvcompress.checkpoint.tokenizer import windows_of
from kvcompress.errors import CalibrationError


@dataclass(frozen=True)
class Windows:
    """The windows of a text: ids [n_windows, seq_len], each standing alone; where they come from."""

    ids: Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, tokenizer: Any, text: str, seq_len: int, max_windows: int | None) -> Windows:
        """Return the first max_windows windows of a text source. Raises CalibrationError for less than one."""
        ids, sha256 = evaluation_windows(tokenizer, text, seq_len, max_windows)
        return cls(ids, text, sha256)

    def protocol(self, dtype: str) -> dict[str, Any]:
        """Return what must be said of the text and the arithmetic with every figure."""
        return {
            "text": self.source if ":" in self.source else Path(self.source).name,
            "text_sha256": self.sha256,
            "seq_len": self.ids.shape[1],
            "windows": self.ids.shape[0],
            "dtype": dtype,
        }


def evaluation_windows(tokenizer: Any, text: str, seq_len: int, max_windows: int | None) -> tuple[Tensor, str]:
    """Return (the first max_windows windows [n, seq_len] of a text, SHA-256 of the file, or of the documents read)."""
    ids: list[int] = []
    digest = hashlib.sha256()
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    n_chars = max_windows * seq_len * CHARS_PER_TOKEN if max_windows else None
    for k, document in enumerate(documents(text, tokenizer, n_chars=n_chars)):
        digest.update(document.encode())
        ids.extend((separator if k else []) + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if max_windows and len(ids) >= max_windows * seq_len:
            break
    windows = windows_of(tokenizer, ids, seq_len, max_windows)
    if not len(windows):
        raise CalibrationError(
            f"too little text: {text} has {len(ids)} tokens, a window needs {seq_len}. "
            "Lower --seq-len or give more text."
        )
    file = Path(text)
    if file.is_file() and file.suffix != ".jsonl":  # what anybody can compare with a file of theirs
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
    return windows, digest.hexdigest()
