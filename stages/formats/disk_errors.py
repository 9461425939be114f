"""What becomes of a file that is truncated, and of a disk that does not answer."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import DamagedFileError, StorageUnavailableError

# A disk that fails with one of these may work again later, as a network share does.
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN}
)


class TruncatedError(ValueError):
    """A file ends before the bytes that its header promises."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate the errors of reading a file.

    Raises:
        DamagedFileError: It is truncated.
        StorageUnavailableError: The disk does not answer at the moment.
        OSError: Any other error, as it came.
    """
    try:
        yield
    except TruncatedError as error:
        raise DamagedFileError(f"{path} is truncated: {error}. Copy it again") from error
    except OSError as error:
        if error.errno not in PASSING:
            raise
        raise StorageUnavailableError(
            f"{path} cannot be read now ({error.strerror}): its disk or network share does not answer. The same "
            "command continues where it stopped"
        ) from error
