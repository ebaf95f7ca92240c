"""How often tasks of Ray were begun. A file of its own, so that the actor's process imports no torch."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """An actor that counts how often each task (call, index) was begun: a task does not know whether it is a retry."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[int, int]] = Counter()

    def begin(self, task: tuple[int, int]) -> None:
        self._begun[task] += 1

    def of(self, task: tuple[int, int]) -> int:
        return self._begun[task]
