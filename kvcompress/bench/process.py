"""A process that is read while it runs, ends with all that it started, and says why it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Timer

#: Names an error at the end of a trace.
_NAMED = re.compile(r"\b\w*(Error|Exception): ")
#: What torch sets before the lines of a trace.
_RANK = re.compile(r"^\[rank\d+\]: ")


@contextmanager
def limited_process(command: list[str], limit: float | None) -> Iterator[tuple[subprocess.Popen[str], Event]]:
    """Run a command, and give it with an event that is set where it was ended at the limit of seconds.

    It has a session of its own, so that what it started ends with it: vLLM's compilers would hold its output open. Its
    input ends when this process does, by whatever signal: see end_with_parent.
    """
    late = Event()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def end_late() -> None:
            late.set()
            end()

        timer = Timer(limit or 0, end_late)
        if limit is not None:
            timer.start()
        try:
            yield process, late
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
        process.wait()
        end()


def last_words(lines: Iterable[str]) -> str:
    """Return the last line that says anything, shortened."""
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1][:200] if spoken else "nothing"


def reason_of(lines: Iterable[str]) -> str | None:
    """Return which of the last lines of a process says why it ended: that of its error; None if it said nothing.

    Lines behind it may explain (CUDA's do), and vLLM's main process points to its workers' "root cause" above.
    """
    spoken = [line.strip() for line in lines if line.strip()]
    named = [line for line in spoken if _NAMED.search(line) and "root cause" not in line]
    said = named or [line for line in spoken if "Error" in line] or spoken
    return _RANK.sub("", said[-1]) if said else None
