"""Text -> token windows: files, JSONL, directories, `datasets` ids and what comes with Python."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.builtin import BUNDLED, bundled_documents, bundled_text, is_builtin
from kvcompress.calibration.records import EXPECTED, RecordReader
from kvcompress.checkpoint.tokenizer import windows_of
from kvcompress.documents import DocumentError, parse_json, read_lines
from kvcompress.errors import CalibrationError

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
#: Characters read per token wanted: enough to spread windows over a long text, little enough to stay quick.
CHARS_PER_TOKEN = 64

#: Texts that need no download; `self` is text that the model samples from itself (see `sampling`).
PROSE, CODE, SELF = "builtin:prose", "builtin:code", "self"


def documents(source: str, tokenizer: Any = None, *, n_chars: int | None = None) -> Iterator[str]:
    """Yield the documents of a text source: a .txt or other text file, a JSONL file, a directory of them,
    one of BUNDLED, `builtin:prose`, `builtin:code`, or a `datasets` id (NAME, or NAME:CONFIG), streamed.

    tokenizer: words conversations by its chat template (`records`). n_chars: how many characters of a text file are
    read at most. Raises CalibrationError for a source that does not exist or cannot be read.
    """
    reader = RecordReader(tokenizer)
    if source in BUNDLED:
        return bundled_documents(source)
    if source == PROSE:
        return _builtin_prose()
    if source == CODE:
        return _builtin_code()
    if is_builtin(source):
        bundled_text(source)  # raises: no such text
    path = Path(source)
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise CalibrationError(f"{source} holds no text files ({', '.join(_TEXT_SUFFIXES)}).")
        return (document for file in files for document in _file_documents(file, reader, n_chars))
    if path.is_file():
        return _file_documents(path, reader, n_chars)
    return _dataset_documents(source, reader)


def text_files(directory: Path) -> list[Path]:
    """Return the files of a directory, and of those below, that are read as text."""
    return sorted(f for f in directory.rglob("*") if f.is_file() and f.suffix in _TEXT_SUFFIXES)


def token_windows(tokenizer: Any, source: str, n_windows: int, seq_len: int) -> Tensor:
    """Return [n_windows, seq_len] ids, evenly spread over the source; documents are joined by the end token.

    Raises CalibrationError if the source has too little text.
    """
    windows = all_windows(tokenizer, source, n_windows, seq_len)
    if len(windows) < n_windows:
        raise CalibrationError(
            f"too little text: {source} has fewer than the {n_windows * seq_len} tokens that are needed "
            f"({len(windows)} of {n_windows} windows of {seq_len}). Give more text, or lower --tokens or --seq-len."
        )
    return windows[spread(len(windows), n_windows)]


def all_windows(tokenizer: Any, source: str, n_windows: int, seq_len: int) -> Tensor:
    """Return the windows [n, seq_len] out of which `token_windows` chooses n_windows: those of the text's beginning."""
    wanted = n_windows * seq_len
    ids: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    n_chars = wanted * CHARS_PER_TOKEN
    for text in _limited(documents(source, tokenizer, n_chars=n_chars), n_chars):
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator)
    return windows_of(tokenizer, ids, seq_len)


def spread(available: int, n: int) -> Tensor:
    """Return the places of n windows, evenly spread over those that are available: [n]."""
    # told, as a model that loads in a thread beside this changes what torch takes for granted
    return torch.linspace(0, available - 1, n, dtype=torch.float32).round().long()


def _limited(texts: Iterator[str], n_chars: int) -> Iterator[str]:
    """Yield texts until n_chars characters have come; the last one is cut."""
    for text in texts:
        yield text[:n_chars]
        n_chars -= len(text)
        if n_chars <= 0:
            return


def _file_documents(file: Path, reader: RecordReader, n_chars: int | None = None) -> Iterator[str]:
    try:
        if file.suffix == ".jsonl":
            for number, line in read_lines(file):
                if line.strip():
                    yield _line_document(line, file, number, reader)
        else:
            with file.open(encoding="utf-8", errors="replace" if file.suffix == ".py" else "strict") as text:
                yield text.read(n_chars)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except DocumentError as error:
        raise CalibrationError(f"{file}: {error}.") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {file}: {error.strerror}.") from error


def _line_document(line: str, file: Path, number: int, reader: RecordReader) -> str:
    try:
        record = parse_json(line)
    except DocumentError as error:
        raise CalibrationError(f"{file}, line {number}: not valid JSON ({error}).") from error
    return reader.document(record, lambda: f"{file}, line {number}")


def check_there(source: str) -> None:
    """Raise CalibrationError where a source is a path, and nothing is there: before a model is loaded for it."""
    is_path = source.startswith((".", "/", "~")) or Path(source).suffix in _TEXT_SUFFIXES
    if is_path and not Path(source).exists():
        raise CalibrationError(f"text {source} does not exist.")


def _dataset_documents(source: str, reader: RecordReader) -> Iterator[str]:
    check_there(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"text {source} does not exist here; to read it as a `datasets` id, pip install 'kvcompress[datasets]'."
        ) from error
    name, _, config = source.partition(":")
    try:
        records = load_dataset(name, config or None, split="train", streaming=True)
        first = next(iter(records))
    except Exception as error:
        raise CalibrationError(
            f"text {source} is no local file, and as a `datasets` id it failed: {str(error).splitlines()[0]}"
        ) from error
    place = f"dataset {source}"
    try:
        reader.document(first, lambda: place)
    except CalibrationError as error:
        fields = f"{place} has no field that is read; it has {list(first)}"
        raise CalibrationError(f"{fields}, expected {EXPECTED}.") from error
    return (reader.document(record, lambda: place) for record in records)


def _builtin_prose() -> Iterator[str]:
    """English that comes with Python: the language reference's topics and the modules' docstrings."""
    import ast
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for file in _stdlib_files():
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        text = "\n\n".join(d for n in nodes if (d := ast.get_docstring(n)) and len(d) > 200)
        if text:
            yield text


def _builtin_code() -> Iterator[str]:
    """The source code of Python's own library."""
    for file in _stdlib_files():
        yield from islice(_file_documents(file, RecordReader()), 1)


@functools.cache
def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in skipped]  # site-packages may hold a hundred thousand files
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    # A stable order that mixes packages, so that the first files read are no alphabet's beginning.
    return sorted(files, key=lambda f: hashlib.sha256(str(f.relative_to(root)).encode()).hexdigest())
