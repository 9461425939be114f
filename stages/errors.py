"""Errors that a stage raises. `lampctl/cli/exit_codes.py` alone says which exit code each becomes."""

import unicodedata

# Control characters, Unicode's own ends of lines and paragraphs, and bytes of a name that are no UTF-8.
_BREAKING = ("Cc", "Zl", "Zp", "Cs")


def one_line(text: str) -> str:
    """The text with control characters as Python writes them: a value from outside cannot break or repaint a line."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _BREAKING else c for c in text)


class StageError(Exception):
    """Base of all errors raised on purpose in `stages`. Each argument is one line of the message."""

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


class UsageError(StageError):
    """What the user asked for cannot be done; the message says what to ask for instead."""


class ResourceError(StageError):
    """Something outside the program is out of reach or used up: the hub, a disk, memory, a device."""


class NumericalError(StageError):
    """A computation on these weights and activations has no usable result (say, a Hessian without a factor)."""


class DamagedFileError(StageError):
    """A file is not what was once written. The message names it, and what in it does not fit."""


class StorageUnavailableError(StageError):
    """A disk or network share does not give a file at the moment. The same work may succeed later."""
