"""Reading what others wrote: bounded in size, depth and numbers; every field compared with its limits."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from kvcompress.documents import (
    DocumentError,
    Within,
    parse_json,
    parse_toml,
    read_json,
    read_lines,
    read_text,
    shaped,
)


@dataclass(frozen=True, slots=True)
class Site:
    layer: Annotated[int, Within(0, 9)]
    bits: tuple[tuple[int, int], ...]
    basis: Literal["latent", "head"]
    loss: float = 0.0


class Report(TypedDict):
    rows: list[dict[str, int]]
    name: str | None
    note: NotRequired[str]


SITE = {"layer": 3, "bits": [[8, 1], [2, 2]], "basis": "head"}


def test_a_dataclass_is_made_and_lists_become_tuples() -> None:
    assert shaped(SITE, Site) == Site(3, ((8, 1), (2, 2)), "head", 0.0)
    assert shaped(SITE | {"loss": 2}, Site).loss == 2


def test_a_typed_dictionary_keeps_what_it_does_not_know() -> None:
    document = {"rows": [{"a": 1}], "name": None, "more": [1]}
    assert shaped(document, Report) == document
    with pytest.raises(DocumentError, match=r"rows\[0\].a must be a whole number, found 'x'"):
        shaped({"rows": [{"a": "x"}], "name": None}, Report)
    with pytest.raises(DocumentError, match="note must be a text"):
        shaped(document | {"note": 3}, Report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 10}, "layer must be a number from 0 to 9, found 10"),
        ({"layer": 1 << 63}, "layer must be a number from 0 to 9"),
        ({"layer": True}, "layer must be a whole number, found True"),
        ({"layer": 1.0}, "layer must be a whole number, found 1.0"),
        ({"layer": []}, "layer must be a whole number, found a list of 0"),
        ({"bits": [[8]]}, r"bits\[0\] must be a list of 2, found 1 items"),
        ({"bits": {}}, "bits must be a list, found an object of 0"),
        ({"bits": [[8, "x"]]}, r"bits\[0\]\[1\] must be a whole number, found 'x'"),
        ({"basis": []}, "basis must be one of latent, head"),
        ({"basis": "other"}, "basis must be one of latent, head, found 'other'"),
        ({"loss": None}, "loss must be a number, found None"),
        ({"colour": 1}, "colour is unknown"),
    ],
)
def test_the_place_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        shaped(SITE | change, Site)


def test_a_missing_member() -> None:
    with pytest.raises(DocumentError, match="basis is missing"):
        shaped({"layer": 1, "bits": []}, Site)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 40 + "]" * 40,
        "[" * 200_000,
        '{"a":' * 200_000,
        "9" * 30,
        "-" + "9" * 5000,
        "1e999",
        "[NaN]",
        "[-Infinity]",
        '"\\ud800"',
        '{"\\uDFFF": 1}',
    ],
    ids=lambda t: t[:12] or "nothing",
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(DocumentError) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_json_that_is_taken() -> None:
    assert parse_json('{"a": [1, -2.5e3, "\\ud83d\\ude00", null, true]}') == {"a": [1, -2500.0, "😀", None, True]}
    assert parse_json("[Infinity]", finite=False) == [float("inf")]
    assert parse_json("[" * 32 + "]" * 32)


@pytest.mark.parametrize("text", ["a = ", "a = " + "[" * 100_000, "a = [[[[[" + "[" * 30 + "]" * 35, "\x00"])
def test_toml_that_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse_toml(text)


def test_a_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**9)  # a hole, which would be read as a gigabyte of zeros
    started = time.perf_counter()
    with pytest.raises(DocumentError, match="1,000,000,000 bytes"):
        read_json(tmp_path / "large.json")
    assert time.perf_counter() - started < 0.5


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DocumentError, match="no regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(OSError):
        read_text(tmp_path / "nowhere")


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("one\n\ntwo")
    assert list(read_lines(file)) == [(1, "one\n"), (2, "\n"), (3, "two")]
    file.write_text("short\n" + "x" * 100)
    with pytest.raises(DocumentError, match="line 2 has more than 99 characters"):
        list(read_lines(file, most=99))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps("Grüße", ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DocumentError, match="not UTF-8"):
        read_json(tmp_path / "a.json", str)
