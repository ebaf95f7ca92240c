"""What a process may allocate of a GPU: the memory that it was given, less what lies outside the allocator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvcompress.calibration import outside
from kvcompress.calibration.memory import CONTEXT_BYTES, SOLVING_BYTES, limited

TOTAL, RESERVED = 80_000_000_000, 3_000_000_000


class Card:
    """A GPU of 80 GB, as torch tells of it: `beside` are the bytes that are neither free nor torch's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beside, self.begun, self.share = 0, list[str](), [0.0]
        properties = type("Properties", (), {"total_memory": TOTAL})
        told: dict[str, Callable[..., object]] = {
            "current_device": lambda: 0,
            "empty_cache": lambda: None,
            "get_device_properties": lambda _: properties,
            "memory_reserved": lambda _: RESERVED,
            "mem_get_info": lambda _: (TOTAL - RESERVED - self.beside, TOTAL),
            "set_per_process_memory_fraction": lambda share, _: self.share.append(share),
        }
        for name, function in told.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(outside, "_begin", lambda _: self.begun.append("pass"))
        monkeypatch.setattr(outside, "_begin_feeding", lambda _: self.begun.append("fits"))

    def allowed(self, *, solves: bool) -> int:
        with limited("cuda", 6_000_000_000, solves=solves):
            allowed = round(self.share[-1] * TOTAL)
        assert self.share[-1] == 1.0  # nothing is held to anything afterwards
        return allowed


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.mark.parametrize("solves", [False, True])
@pytest.mark.parametrize("away", [-300_000_000, 0, 300_000_000])
def test_what_is_found_outside_is_left_out(card: Card, away: int, solves: bool) -> None:
    card.beside = CONTEXT_BYTES + (SOLVING_BYTES if solves else 0) + away
    assert card.allowed(solves=solves) + card.beside == 6_000_000_000 - 64_000_000


@pytest.mark.parametrize("solves", [False, True])
def test_what_others_hold_is_not_taken_for_its_own(card: Card, solves: bool) -> None:
    card.beside = 30_000_000_000
    assert card.allowed(solves=solves) == 6_000_000_000 - CONTEXT_BYTES - (SOLVING_BYTES if solves else 0)


def test_it_looks_when_all_that_it_will_use_has_begun(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: int) -> tuple[int, int]:
        card.begun.append("look")
        return TOTAL, TOTAL

    monkeypatch.setattr(torch.cuda, "mem_get_info", look)
    card.allowed(solves=False)
    card.allowed(solves=True)
    assert card.begun == ["pass", "look", "pass", "fits", "look"]
