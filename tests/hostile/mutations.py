"""Seeded damage: to JSON by its structure, to any bytes, to a safetensors file by its header, to a directory."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

#: Values that were meant for another field, or for none.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 17, 255, 2**31, 2**53, 2**63, 10**9, 10**30, -(10**12)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "key", "../../etc/passwd", "/etc/passwd", "\ud800", "\x00\x1b[2J", "é" * 300, "x" * 10_000),
    *([], {}, [[]], [None], [0] * 1000, {"a": 1}, {"": {}}, [[8, 10**9]], [[16, 2**63]], [[8, -5]]),
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of everything inside a document."""
    found, waiting = [], [document]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            found.append((value, key))
            waiting.append(value[key])
    return found


def damaged_json(document: Any, rng: random.Random) -> bytes:
    """Return the text of a document with one to three changes; the document itself is used up."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(document)
        if not found:
            return json.dumps(copy.deepcopy(rng.choice(ODD))).encode()
        _change(*rng.choice(found), found, rng)
    text = json.dumps(document).encode()
    return damaged_bytes(text, rng) if rng.random() < 0.05 else text


def _change(container: Any, key: Any, found: list[tuple[Any, Any]], rng: random.Random) -> None:
    value = container[key]
    kind = rng.randrange(9)
    if kind < 4:
        container[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 4:
        del container[key]
    elif kind == 5:
        other, place = rng.choice(found)
        container[key] = (
            json.loads(json.dumps(other[place])) if place in (other if isinstance(other, dict) else ()) else 1
        )
    elif kind == 6 and isinstance(value, (int, float)) and not isinstance(value, bool):
        container[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)))
    elif kind == 7:
        container[key] = rng.choice(([value], {"a": value}, [value, value], nested(value, rng.choice((40, 250)))))
    elif isinstance(container, list):
        container.extend(container[:1] * rng.choice((1, 50)))
    else:
        container[rng.choice(("surprise", str(key) + "_", ""))] = value


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes that were cut, overwritten, repeated, interspersed or nested."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[at:]
    if kind == 2:
        return data[:at] + data[at:] * rng.choice((2, 5))
    if kind == 3:
        return data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[at:]
    if kind == 4:
        return (
            data[:at]
            + rng.choice((b"[", b'{"a":', b"a.", b"\n", b"\xef\xbb\xbf", b"9")) * rng.choice((1, 50, 20_000))
            + data[at:]
        )
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 64)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256) if kind < 7 else rng.choice(b'"[]{}:,0-9.eE\\')
    return bytes(changed)


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header, another length of it, or other bytes of tensors."""
    (n,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + n]), data[8 + n :]
    kind = rng.randrange(5)
    if kind == 0:
        return damaged_bytes(data, rng)
    if kind == 1:
        return struct.pack("<Q", rng.choice((0, 1, n - 1, n + 1, 2**20, 2**40, 2**63, 2**64 - 1))) + data[8:]
    if kind == 2:
        changed = bytearray(tensors)
        for _ in range(rng.choice((1, 8, 200)) if changed else 0):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        return data[: 8 + n] + bytes(changed)
    names = [name for name in header if name != "__metadata__"]
    if kind == 3:  # shapes and types that the file's length still fits
        entry = header[rng.choice(names)]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["dtype"], width = rng.choice(
            (("U8", 1), ("I8", 1), ("F16", 2), ("BF16", 2), ("I32", 4), ("F32", 4), ("I64", 8))
        )
        rest = size // width
        entry["shape"] = rng.choice(([rest], [1, rest], [rest, 1], [1, 1, rest], [rest // 2, 2], [2, rest // 2]))
        if rng.random() < 0.5 and len(names) > 1:
            a, b = rng.sample(names, 2)
            header[a], header[b] = header[b], header[a]
        encoded = json.dumps(header).encode()
    else:
        encoded = damaged_json(header, rng)
    return struct.pack("<Q", len(encoded)) + encoded + tensors


def replace_file(file: Path, content: bytes) -> None:
    """Write a file anew; what it was a hard link of stays as it is."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def damaged_place(file: Path, outside: Path, rng: random.Random) -> None:
    """Make of a file what is none: a link out, a circle, a pipe, a device, a directory, a gigabyte of zeros."""
    moved = outside / file.name
    kind = rng.randrange(8)
    if kind == 0 and file.exists():
        moved.write_bytes(file.read_bytes())
    file.unlink(missing_ok=True)
    if kind == 0 and moved.exists():
        file.symlink_to(moved)
    elif kind == 1:
        file.symlink_to(file.name)
    elif kind == 2:
        os.mkfifo(file)
    elif kind == 3:
        file.symlink_to("/dev/zero")
    elif kind == 4:
        file.mkdir()
    elif kind == 5:
        file.symlink_to(outside / "nowhere")
    elif kind == 6:
        with file.open("wb") as handle:
            handle.truncate(10**9)
