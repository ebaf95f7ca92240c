"""Answers already given, on disk: a killed evaluation continues, and several outputs share the original's answers."""

from __future__ import annotations

import fcntl
import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from kvcompress.documents import DocumentError, parse_json, read_text, shaped
from kvcompress.errors import OptionError, OutputError
from kvcompress.evaluate.scoring import Pair, Score, score_pairs
from kvcompress.evaluate.sides import Side

_HEADER = {"format": "kvcompress answers", "version": 1}
_MOST_BYTES = 1 << 30
#: Side, request, and the text that was generated, or log-likelihood and whether it is the likeliest.
_Line = tuple[str, str, str | tuple[float, bool]]


class Answers:
    """Answers by (side, request), appended to a JSONL file as they come; without a file they are only remembered.

    To be used in a `with` block. The first line of the file is a header; every other one is [side, request, answer].
    A last line that a killed run left unfinished is dropped. Raises OptionError for a file of another kind or one that
    another run is writing to, OutputError if it cannot be written.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._known: dict[tuple[str, str], Any] = {}
        self._file: TextIO | None = None
        if file is not None:
            try:
                self._open(file)
            except BaseException:
                self.__exit__()
                raise

    def get(self, side: Side, request: str) -> Any | None:
        return self._known.get((side.fingerprint, request))

    def put(self, side: Side, request: str, answer: Any) -> None:
        """Remember an answer (anything that JSON holds) and append it to the file."""
        self._known[side.fingerprint, request] = answer
        if self._file:
            self._file.write(json.dumps([side.fingerprint, request, answer]) + "\n")

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def scores(
        self,
        side: Side,
        pairs: Sequence[Pair],
        *,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
        by: Callable[[list[Pair]], list[Score]] | None = None,
    ) -> list[Score]:
        """Return the score of each pair, computing only those that are not known yet. by: what scores pairs for the
        side, where it does not do so itself."""
        keys = [request_key(pair) for pair in pairs]
        new = {key: i for i, key in enumerate(keys) if isinstance(self.get(side, key), (str, type(None)))}
        missing = list(new)

        def keep(index: int, score: Score) -> None:
            self.put(side, missing[index], [score.logprob, score.is_greedy])

        def report(done: int, total: int) -> None:
            self.flush()
            if progress:
                progress(len(keys) - total + done, len(keys))

        unknown = [pairs[i] for i in new.values()]
        if by is None:
            score_pairs(side, unknown, batch_size=batch_size, on_score=keep, progress=report)
        elif unknown:
            for index, score in enumerate(by(unknown)):
                keep(index, score)
            self.flush()
        return [Score(*self.get(side, key)) for key in keys]  # type: ignore[misc]

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _open(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lines of two runs would lie in each other
            text = read_text(file, most=_MOST_BYTES)
            whole = text[: text.rfind("\n") + 1]
            if text and not whole:
                raise ValueError
            self._read(whole)
            self._file.truncate(len(whole.encode()))
            if not whole:
                self._file.write(json.dumps(_HEADER) + "\n")
        except BlockingIOError as error:
            raise OptionError(f"another run is writing answers to {file}. Wait for it, or name a new file.") from error
        except OSError as error:
            raise OutputError(f"cannot write the answers to {file}: {error.strerror}.") from error
        except (ValueError, TypeError) as error:  # JSON and UTF-8 errors are ValueErrors
            raise OptionError(f"{file} is no file of answers, or it is damaged. Name a new file.") from error

    def _read(self, text: str) -> None:
        for number, line in enumerate(text.splitlines()):
            record = parse_json(line, finite=False)  # of an impossible continuation the likelihood is minus infinity
            if number == 0:
                if record != _HEADER:
                    raise DocumentError("it has no header")
                continue
            side, request, answer = shaped(record, _Line)
            self._known[side, request] = answer


def request_key(pair: Pair) -> str:
    """Return what names a pair in a file of answers: a hash of its token ids and of where the continuation begins."""
    digest = hashlib.sha256(array("q", [len(pair.context), *pair.context, *pair.continuation]).tobytes())
    return digest.hexdigest()[:20]


def text_key(*parts: str) -> str:
    """Return what names a request that is made of texts."""
    return "text-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
