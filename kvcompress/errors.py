"""Errors of kvcompress: one message that says what is wrong, what was expected and what to do next."""

_LONGEST = 2000


class KVCompressError(Exception):
    """Base of every error that a user can cause and mend. The command line prints it in one line and exits with 2."""

    def __str__(self) -> str:
        """Return the message as one line of printable characters, whatever a file's own names and texts hold."""
        message = " ".join(super().__str__().split())
        shown = message if len(message) <= _LONGEST else message[:_LONGEST] + "..."
        return "".join(c if c.isprintable() else "?" for c in shown)


class CheckpointError(KVCompressError):
    """The checkpoint is missing, broken, unsafe or holds values that cannot be compressed."""


class UnsupportedModelError(KVCompressError):
    """The model's architecture, or one of its features, is not supported; the message gives the reason."""


class CalibrationError(KVCompressError):
    """The calibration text or the saved moments cannot be used."""


class BudgetError(KVCompressError):
    """The requested budget cannot be met by the chosen bases and policy."""


class OptionError(KVCompressError):
    """An option or a recipe has a value that makes no sense."""


class OutputError(KVCompressError):
    """The output cannot be written."""


class AttachmentError(KVCompressError):
    """A model's attention does not go through the compressed cache that is attached to it."""


class Note(UserWarning):
    """Something that was decided and that the user should hear of; the command line prints it in one line."""
