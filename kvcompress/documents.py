"""Files that others may have written: bounded before they are read, checked by shape before a number of theirs is used.

A shape is a type: a dataclass, a TypedDict, Literal, a tuple or list of shapes, `X | None`, int, float, str, bool, and
`Annotated[int, Within(1, 8)]`. So a field and what it may be stand in one place, and nothing is computed, allocated
or repeated by a number that was not compared with its limits.

pydantic was weighed for the shapes: what bounds a file before it is parsed would stay here, its strict mode makes no
dataclass of a parsed object and no tuple of a list, and it drops members that a TypedDict does not name.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

#: A report of 126 layers of 4096 numbers a site has 10 MB; a file of this size takes less than 2 GB when it is parsed.
MAX_BYTES = 48 << 20
#: Nested deeper than anything that is written here, and far below where Python's own recursion ends.
MAX_DEPTH = 32
_MAX_DIGITS = 18  # integers of 64 bits


class DocumentError(ValueError):
    """A file is too large, no valid JSON or TOML, or not of the shape asked for; the message names the place."""


@dataclass(frozen=True, slots=True)
class Within:
    """The numbers that a field may hold, both ends included; of a text or a list, how long it may be."""

    least: float
    most: float

    def check(self, value: Any, place: str) -> None:
        measured = len(value) if isinstance(value, (str, list, tuple, dict)) else value
        if not self.least <= measured <= self.most:
            what = "length" if measured is not value else "number"
            raise DocumentError(f"{place} must be a {what} from {self.least:g} to {self.most:g}, found {_shown(value)}")


@dataclass(frozen=True, slots=True)
class OneOf:
    """The numbers that a field may hold."""

    numbers: tuple[int, ...]

    def check(self, value: Any, place: str) -> None:
        if value not in self.numbers:
            raise DocumentError(f"{place} must be one of {', '.join(map(str, self.numbers))}, found {_shown(value)}")


#: Sizes, counts and bytes of anything that exists.
Count = Annotated[int, Within(0, 1 << 60)]
#: A number that is one: neither NaN nor infinite.
Finite = Annotated[float, Within(-1e300, 1e300)]


def is_file_name(name: str) -> bool:
    """Return whether a name that was read is that of a file in a directory: no way out of it, and none too long."""
    return Path(name).name == name and "\0" not in name and len(os.fsencode(name)) <= 255


def read_text(file: Path, *, most: int = MAX_BYTES) -> str:
    """Return the text of a regular file of at most `most` bytes. Raises DocumentError or OSError."""
    with open(file, "rb", opener=_opened_at_once) as handle:
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DocumentError("it is no regular file")
        data = handle.read(most + 1) if found.st_size <= most else b""
    if found.st_size > most or len(data) > most:
        raise DocumentError(f"it has {max(found.st_size, len(data)):,} bytes, more than the {most:,} that are read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(file: Path, shape: Any = dict, *, finite: bool = True) -> Any:
    """Return a JSON file's content in a shape. Raises DocumentError or OSError."""
    return shaped(parse_json(read_text(file), finite=finite), shape)


def read_lines(file: Path, *, most: int = MAX_BYTES) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a text file, of any size; no line may have more than `most` characters.

    Raises DocumentError, OSError, and UnicodeDecodeError where the file is not UTF-8.
    """
    with file.open(encoding="utf-8") as handle:
        for number, line in enumerate(iter(partial(handle.readline, most + 1), ""), 1):
            if len(line) > most:
                raise DocumentError(f"line {number} has more than {most:,} characters")
            yield number, line


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return parsed JSON: integers of 64 bits, nested MAX_DEPTH deep at most, and, if `finite`, no NaN and infinities.

    Raises DocumentError.
    """
    try:
        document = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_no_constant if finite else None,
        )
    except RecursionError as error:
        raise DocumentError("it is nested too deeply") from error
    except ValueError as error:
        raise DocumentError(str(error)) from error
    _check_nesting(document)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        _check_characters(document)
    return document


def parse_toml(text: str) -> dict[str, Any]:
    """Return parsed TOML. Raises DocumentError."""
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise DocumentError("it is nested too deeply") from error
    except ValueError as error:
        raise DocumentError(str(error)) from error
    _check_nesting(document)
    return document


def shaped(value: Any, shape: Any, place: str = "it") -> Any:
    """Return a parsed value in a shape: dataclasses are made, lists become tuples where the shape is a tuple.

    A dataclass takes no members beside its fields; a TypedDict lets others stand. Raises DocumentError with the place.
    """
    if shape is Any:
        return value
    origin, inner = get_origin(shape), get_args(shape)
    if origin is Annotated:
        found = shaped(value, inner[0], place)
        for limit in inner[1:]:
            limit.check(found, place)
        return found
    if origin is NotRequired:
        return shaped(value, inner[0], place)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, place)
    if origin is Literal:
        if not any(value == v and type(value) is type(v) for v in inner):
            raise DocumentError(f"{place} must be one of {', '.join(map(str, inner))}, found {_shown(value)}")
        return value
    if origin in (tuple, list):
        return _sequence(value, origin, inner, place)
    if origin is dict:
        members = shaped(value, dict, place)
        return {key: shaped(inside, inner[1], f"{place}.{_cut(key)}") for key, inside in members.items()}
    if is_dataclass(shape) or is_typeddict(shape):
        return _members(value, shape, place)
    return _plain(value, shape, place)


def _one_of(value: Any, shapes: tuple[Any, ...], place: str) -> Any:
    if value is None and types.NoneType in shapes:
        return None
    choices = [s for s in shapes if s is not types.NoneType]
    for shape in choices[:-1]:
        try:
            return shaped(value, shape, place)
        except DocumentError:
            continue
    return shaped(value, choices[-1], place)


def _sequence(value: Any, kind: Any, shapes: tuple[Any, ...], place: str) -> Any:
    if not isinstance(value, list):
        raise DocumentError(f"{place} must be a list, found {_shown(value)}")
    if kind is list or shapes[-1] is Ellipsis:
        if shapes[0] is float and all(type(v) is float for v in value):  # spectra have a million of them
            return kind(value)
        return kind(shaped(v, shapes[0], f"{place}[{i}]") for i, v in enumerate(value))
    if len(value) != len(shapes):
        raise DocumentError(f"{place} must be a list of {len(shapes)}, found {len(value)} items")
    return tuple(shaped(v, s, f"{place}[{i}]") for i, (v, s) in enumerate(zip(value, shapes, strict=True)))


def _members(value: Any, shape: Any, place: str) -> Any:
    members = shaped(value, dict, place)
    hints, optional = _hints(shape)
    prefix = "" if place == "it" else f"{place}."
    if is_dataclass(shape):
        for key in members:
            if key not in hints:
                raise DocumentError(f"{prefix}{_cut(key)} is unknown")
    found = dict(members)
    for name, hint in hints.items():
        if name in members:
            found[name] = shaped(members[name], hint, prefix + name)
        elif name not in optional:
            raise DocumentError(f"{prefix}{name} is missing")
    return shape(**found) if isinstance(shape, type) and is_dataclass(shape) else found


@lru_cache(maxsize=256)
def _hints(shape: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the members of a dataclass or TypedDict with their shapes, and those that may be missing."""
    hints = get_type_hints(shape, include_extras=True)
    if is_dataclass(shape):
        given = [f for f in fields(shape) if f.default is not MISSING or f.default_factory is not MISSING]
        return hints, frozenset(f.name for f in given)
    return hints, frozenset(n for n, h in hints.items() if get_origin(h) is NotRequired)


_SAID = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _plain(value: Any, shape: Any, place: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if shape is int else whole or isinstance(value, float) if shape is float else isinstance(value, shape)
    if not fits:
        raise DocumentError(f"{place} must be {_SAID[shape]}, found {_shown(value)}")
    return value


def _check_nesting(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise DocumentError(f"it is nested more than {MAX_DEPTH} deep")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_characters(document: Any) -> None:
    """Raise DocumentError for half of a surrogate pair, which no file can hold as UTF-8."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise DocumentError(f"a text holds half of a character: {_shown(value)}")


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise DocumentError(f"the number {_cut(digits)} is beyond any size")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise DocumentError(f"the number {_cut(digits)} is beyond any size")
    return number


def _no_constant(name: str) -> float:
    raise DocumentError(f"{name} is no number")


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for who writes to it


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return _cut(repr(value if not isinstance(value, str) else value[:60]))


def _cut(text: str) -> str:
    """Return a text that fits in a line, and that any terminal can print."""
    line = text.encode("utf-8", "backslashreplace").decode("utf-8")[:60]
    return "".join(c if c.isprintable() else " " for c in line)
