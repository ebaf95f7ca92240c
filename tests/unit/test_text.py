"""Calibration text: sources, windows, mixtures."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompress.calibration.builtin import BUNDLED
from kvcompress.calibration.text import CODE, PROSE, check_there, documents, token_windows
from kvcompress.errors import CalibrationError
from kvcompress.evaluate.windows import evaluation_windows
from tests.tiny_models import EOS, build_tokenizer, prose


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


class Letters:
    """A tokenizer of one token a character, so that windows can be read."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def write(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(documents(write(tmp_path / "a.txt", "One.\n\nZwölf."))) == ["One.\n\nZwölf."]


def test_jsonl_takes_the_text_field(tmp_path: Path) -> None:
    lines = [{"text": "a", "content": "x"}, {"content": "b"}, {"id": 1, "document": "c"}]
    source = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert list(documents(source)) == ["a", "b", "c"]


def test_a_directory_is_read_in_order_and_in_depth(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "2.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}\n{"text": "fourth"}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("source", [PROSE, CODE, *BUNDLED])
def test_builtin_text_is_plenty_and_stable(source: str) -> None:
    first = list(islice(documents(source), 20))
    assert sum(map(len, first)) > 19_000
    assert first == list(islice(documents(source), 20))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin.txt", "Grüße".encode("latin-1"), r"not UTF-8 text \(.* at byte 2\)"),
        ("latin.jsonl", b'{"text": "ok"}\n{"text": "Gr\xfc\xdfe"}\n', "not UTF-8"),
        ("broken.jsonl", b'{"text": "ok"}\n{"text": \n', r"line 2: not valid JSON"),
        ("fields.jsonl", b'{"text": "ok"}\n\n{"words": "no"}\n', r"line 3: expected an object with a text \(text"),
        ("list.jsonl", b'["text"]\n', r"line 1: expected an object"),
        ("number.jsonl", b'{"text": 3}\n', r"line 1: expected an object"),
        ("deep.jsonl", b'{"text": "ok"}\n' + b"[" * 10**6, r"line 2: not valid JSON \(it is nested too deeply\)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=reason) as error:
        list(documents(str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/such/place", "~/nothing.jsonl"])
def test_missing_files(source: str) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        list(documents(source))
    with pytest.raises(CalibrationError, match=f"text {source} does not exist"):
        check_there(source)


def test_what_may_be_a_dataset_is_looked_for_later(tmp_path: Path) -> None:
    for source in ("user/corpus", "self", "builtin:prose", str(tmp_path)):
        check_there(source)


def test_a_directory_without_text(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(CalibrationError, match="holds no text files"):
        documents(str(tmp_path))


class TestDatasets:
    """`datasets` ids, with the package replaced by a stand-in: nothing is downloaded."""

    def serve(self, monkeypatch: pytest.MonkeyPatch, records: Any) -> list[Any]:
        asked: list[Any] = []

        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
            asked.append((name, config, split, streaming))
            if isinstance(records, Exception):
                raise records
            return records

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    @pytest.mark.parametrize(("source", "config"), [("org/books", None), ("org/books:small", "small")])
    def test_streams_the_text_field(self, monkeypatch: pytest.MonkeyPatch, source: str, config: str | None) -> None:
        asked = self.serve(monkeypatch, [{"content": "a"}, {"content": "b"}])
        assert list(documents(source)) == ["a", "b"]
        assert asked == [("org/books", config, "train", True)]

    def test_names_what_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, ConnectionError("no route\nto host"))
        with pytest.raises(CalibrationError, match="no route") as error:
            documents("org/books")
        assert "\n" not in str(error.value)

    def test_without_a_text_field(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, [{"image": 1}])
        with pytest.raises(CalibrationError, match=r"no field that is read; it has \['image'\]"):
            documents("org/pictures")

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CalibrationError, match=r"pip install 'kvcompress\[datasets\]'"):
            documents("org/books")


def test_windows_are_the_same_while_a_model_of_16_bits_loads(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "abcdefgh" * 400)  # more windows than bfloat16 counts exactly
    windows = token_windows(Letters(), source, 101, 4)
    torch.set_default_dtype(torch.bfloat16)  # as transformers does, for all threads
    try:
        again = token_windows(Letters(), source, 101, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(windows, again)


def test_windows_spread_evenly(tmp_path: Path) -> None:
    """Ten windows of four letters; three of them are the first, the middle and the last."""
    source = write(tmp_path / "a.txt", "".join(chr(97 + i // 4) for i in range(40)))
    windows = token_windows(Letters(), source, 3, 4)
    assert ["".join(map(chr, w)) for w in windows.tolist()] == ["aaaa", "eeee", "jjjj"]


def test_documents_are_joined_by_the_end_token(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "ab"}\n{"text": "cd"}')
    assert token_windows(Letters(), source, 1, 6).tolist() == [[97, 98, 0, 99, 100, 0]]


def test_windows_hold_the_tokens_of_the_text(tokenizer: Any, tmp_path: Path) -> None:
    text = prose(400)
    windows = token_windows(tokenizer, write(tmp_path / "a.txt", text), 4, 32)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS]
    chunks = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert all(row in chunks for row in windows.tolist())
    assert windows[0].tolist() == chunks[0]
    assert len({tuple(row) for row in windows.tolist()}) == 4


@pytest.mark.parametrize(("n_windows", "enough"), [(9, True), (10, True), (11, False)])
def test_too_little_text(tmp_path: Path, n_windows: int, enough: bool) -> None:
    """39 letters and an end token are ten windows of four."""
    source = write(tmp_path / "a.txt", "x" * 39)
    if enough:
        assert token_windows(Letters(), source, n_windows, 4).shape == (n_windows, 4)
    else:
        with pytest.raises(CalibrationError, match=r"the 44 tokens that are needed \(10 of 11 windows of 4\)"):
            token_windows(Letters(), source, n_windows, 4)


def test_an_empty_file_is_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too little text"):
        token_windows(Letters(), write(tmp_path / "a.txt", ""), 1, 4)


class Beginning(Letters):
    """A tokenizer that begins every text with token 1, unless it is told not to."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "abcdefghij")
    assert token_windows(Beginning(), source, 2, 5).tolist() == [[1, 97, 98, 99, 100], [1, 101, 102, 103, 104]]
    windows, _ = evaluation_windows(Beginning(), source, 5, None)
    assert windows.tolist() == [[1, 97, 98, 99, 100], [1, 101, 102, 103, 104]]
