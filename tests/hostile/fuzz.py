"""Damages every file that kvcompress reads, for as long as it is told: each case succeeds or is refused in one line.

    python -m tests.hostile.fuzz --cases 100000 --seed 1
    python -m tests.hostile.fuzz --minutes 30 --workers 8
    python -m tests.hostile.fuzz --replay plan:1:4711

A case is named KIND:SEED:NUMBER and can be repeated alone. It fails if it raises anything but a KVCompressError, says
more than a line, takes more than 10 seconds or 2 GB, or takes the process down. Cases run in forked processes, in
batches; one that hangs is killed by its parent. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

SECONDS, BYTES = 10, 2 << 30
_BATCH = 250
#: Slack for a machine that does other things: a case's own time is that of its process.
_WALL_SECONDS = 120


def one_case(name: str, scratch: Path) -> str:
    """Run a case and return success, refused, or what went wrong."""
    from kvcompress.errors import KVCompressError
    from tests.hostile.fuzz_cases import KINDS

    kind, _, _ = name.split(":")
    directory = scratch / "case"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](random.Random(name), directory)
        outcome = "success"
    except KVCompressError as error:
        outcome = "refused" if "\n" not in str(error) else f"more than a line: {error!r}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {str(error)[:200]!r} in {place.filename}:{place.lineno}"
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if seconds > SECONDS:
        return f"{seconds:.1f} seconds"
    return outcome if peak < BYTES else f"{peak / 1e9:.1f} GB"


def _child(names: list[str], scratch: Path, pipe: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4 * BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for name in names:
        os.write(pipe, f"{name}\t\n".encode())
        outcome = one_case(name, scratch).replace("\n", " ").replace("\t", " ")
        os.write(pipe, f"{name}\t{outcome}\n".encode("utf-8", "replace"))
        if outcome not in ("success", "refused"):
            return  # the peak of its memory would be that of all that follow


def _is_starved(child: int) -> bool:
    """Return whether a process that says nothing would run if the machine let it, and has not had its seconds yet."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return fields[0] == "R" and seconds < 10 * SECONDS  # those of a whole batch


def run_batch(names: list[str], scratch: Path) -> Iterator[tuple[str, str]]:
    """Yield (case, outcome) of cases run in processes of their own; a dead or hanging one costs its case only."""
    while names:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                _child(names, scratch, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        current, done = None, 0
        with os.fdopen(reader, "rb", buffering=0) as lines:
            buffer = b""
            while True:
                if not select.select([lines], [], [], _WALL_SECONDS)[0]:
                    if _is_starved(child):
                        continue
                    os.kill(child, signal.SIGKILL)
                    break
                data = lines.read(1 << 16)
                if not data:
                    break
                *whole, buffer = (buffer + data).split(b"\n")
                for line in whole:
                    current, _, outcome = line.decode("utf-8", "replace").partition("\t")
                    if outcome:
                        yield current, outcome
                        current, done = None, done + 1
        _, status = os.waitpid(child, 0)
        if current is not None or status:
            yield names[done], "hangs" if status == signal.SIGKILL else f"the process ended: {status}"
            done += 1
        names = names[done:]


def run(
    *, seed: int, cases: int | None, minutes: float | None, kinds: list[str], workers: int = 1, report: float = 30
) -> list[str]:
    """Return the failures, 'case: what', of so many cases or minutes; every kind has its share.

    workers: processes that share the batches out. Which cases there are does not depend on them.
    """
    from tests.hostile.fuzz_material import prepare

    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    started = last = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        prepare(Path(scratch) / "pristine")
        for number, kind in enumerate(
            kinds * 4
        ):  # what is imported or compiled at a first use is there before processes are forked
            one_case(f"{kind}:0:{number}", Path(scratch))
        until = None if minutes is None else started + 60 * minutes
        for name, outcome in _outcomes(_batches(seed, cases, until, kinds), Path(scratch), workers):
            outcomes[outcome if outcome in ("success", "refused") else "failed"] += 1
            if outcome not in ("success", "refused"):
                failures.append(f"{name}: {outcome}")
                print(f"FAILED {failures[-1]}", flush=True)
            if time.monotonic() > last + report:
                last = time.monotonic()
                print(f"{sum(outcomes.values())} cases, {dict(outcomes)}, {last - started:.0f} s", flush=True)
    print(f"{sum(outcomes.values())} cases, {dict(outcomes)}, {time.monotonic() - started:.0f} s", flush=True)
    return failures


def _batches(seed: int, cases: int | None, until: float | None, kinds: list[str]) -> Iterator[list[str]]:
    """Yield names of cases, kinds in turn, until there are as many as asked for or the time is over."""
    for number in itertools.count(0, _BATCH):
        n = _BATCH if cases is None else min(_BATCH, cases - number)
        if n <= 0 or (until is not None and time.monotonic() > until):
            return
        yield [f"{kinds[i % len(kinds)]}:{seed}:{i}" for i in range(number, number + n)]


def _outcomes(batches: Iterator[list[str]], scratch: Path, workers: int) -> Iterator[tuple[str, str]]:
    """Yield (case, outcome) of every batch, in the order in which they end."""
    if workers == 1:
        for names in batches:
            yield from run_batch(names, scratch)
        return
    running: set[Future[list[tuple[str, str]]]] = set()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for names in batches:
            running.add(pool.submit(_whole_batch, names, scratch))
            if len(running) > workers:  # one waits, so that nobody does
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from itertools.chain.from_iterable(future.result() for future in done)
        yield from itertools.chain.from_iterable(future.result() for future in running)


def _whole_batch(names: list[str], scratch: Path) -> list[tuple[str, str]]:
    return list(run_batch(names, scratch / str(os.getpid())))


def main() -> int:
    from tests.hostile.fuzz_cases import KINDS
    from tests.hostile.fuzz_material import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    parser.add_argument("--replay", metavar="KIND:SEED:NUMBER")
    args = parser.parse_args()
    if args.replay:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch) / "pristine")
            directory = Path(scratch) / "case"
            directory.mkdir()
            KINDS[args.replay.split(":")[0]](random.Random(args.replay), directory)
        return 0
    cases = 1000 if args.cases is None and args.minutes is None else args.cases
    kinds = args.kind or list(KINDS)
    failures = run(seed=args.seed, cases=cases, minutes=args.minutes, kinds=kinds, workers=max(1, args.workers))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
