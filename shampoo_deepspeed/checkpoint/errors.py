"""CheckpointError, and foreign text in a form that is safe to print."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, of an unknown format, or does not fit; the message says which and why."""

    def __init__(self, message: str) -> None:
        """Take a message; what a terminal would obey in it, as in a path or a name, becomes an escape."""
        super().__init__("\n".join(map(printable, message.split("\n"))))


class MissingError(CheckpointError):
    """A file or folder of a checkpoint is not there."""


def printable(text: str) -> str:
    """The text with whatever a terminal would obey, and what cannot be encoded, as escapes like ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: object) -> str:
    """A foreign value as it is shown in a message: short, printable, texts in quotes."""
    return printable(_SHORT.repr(value))
