"""Failures that a user can mend: one line on stderr and exit code 2; anything else is a bug and keeps its traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from kvcompress.errors import KVCompressError, OptionError

# typer carries its own copy of click since 0.26 and names only this subclass in public.
_UsageError = typer.BadParameter.__mro__[1]


#: Of the operating system: no room, or no right. That is no bug, whatever was read or written.
_NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

#: What torch says of a CPU's memory.
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"

#: Packages that fit one version of torch each.
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class OneLineFailures(TyperGroup):
    """The group of commands, which reports what goes wrong in any of them."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any) -> Any:
        with one_line_failures():
            _check_encoding(args)
            return super().make_context(info_name, args, *more, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with one_line_failures():
            return super().invoke(ctx)


@contextmanager
def one_line_failures() -> Iterator[None]:
    """Turn a user's error within the block into one line on stderr and an exit code: 2, or 130 after Ctrl-C."""
    try:
        yield
    except KVCompressError as error:
        _print_line(str(error))
        raise typer.Exit(2) from error
    except _UsageError as error:
        context = error.ctx  # type: ignore[attr-defined]
        hint = f" See '{context.command_path} --help'." if context else ""
        message = error.format_message().rstrip(". \n")  # type: ignore[attr-defined]
        _print_line(f"{message}.{hint}")
        raise typer.Exit(2) from error
    except OSError as error:
        if error.errno not in _NO_ROOM_OR_RIGHT:
            raise
        where = f": {error.filename}" if error.filename else ""  # nothing of what is printed
        _print_line(f"{error.strerror}{where}.")
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if not _tells_of_memory(error):
            raise
        said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        mend = "Free some, or ask for less at once: a smaller --seq-len, or compress --memory, which streams layers."
        _print_line(f"{said}. {mend}")
        raise typer.Exit(2) from error
    except ImportError as error:
        unfit = _made_for_another_torch(error)
        if unfit is None:
            raise
        _print_line(
            f"transformers cannot be imported: {unfit}, which it imports where it is installed, was made for another "
            f"torch. kvcompress does not need it: pip uninstall {unfit}, or install the one for this torch."
        )
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        _print_line("interrupted.")
        raise typer.Exit(130) from error


def _tells_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU, or torch on a CPU, had no room; torch may not be imported here."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or _NO_MEMORY in str(error)


def _made_for_another_torch(error: BaseException | None) -> str | None:
    """Return which companion of torch failed while transformers imported it, or None."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
            if package in _COMPANIONS:
                return str(package)
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return None


def _check_encoding(args: list[str]) -> None:
    """Raise OptionError for bytes that are no UTF-8: JSON, safetensors and tokenizers take no others."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"'{arg}' is not UTF-8. Rename the file, or give the text in UTF-8.") from error


def _print_line(message: str) -> None:
    typer.echo(f"{typer.style('error:', fg='red')} {' '.join(message.split())}", err=True)
