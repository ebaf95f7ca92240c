"""The checkpoints of a training, from which one that was killed goes on: transformers' own, beside the output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcompress.checkpoint.writer import is_full
from kvcompress.errors import OutputError

#: What torch says where it cannot write on.
_CUT_SHORT = ("iostream error", "file write failed")


def last_checkpoint(scratch: Path) -> str | None:
    """Return where a killed training can go on from, or None: the last checkpoint that was written to its end."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    whole = [c for c in scratch.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_whole(c)]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the training's state, which is written when all else is."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True


@contextmanager
def explained_disk(scratch: Path) -> Iterator[None]:
    """Turn a disk that is too small for the checkpoints in `scratch` into one clear OutputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full(error) and not any(text in str(error) for text in _CUT_SHORT):
            raise
        raise OutputError(
            f"no space left for the training's checkpoints in {scratch}. Free some space and go on with --resume, or "
            "remove them."
        ) from error
