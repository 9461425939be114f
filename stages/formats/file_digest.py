"""Local files that a user names: where they are, and their size and sha256, as records keep them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UsageError
from stages.formats.disk_errors import reading


def local_path(name: str) -> Path:
    """The path that a user wrote, with ~ expanded.

    Raises:
        UsageError: A ~user is not there, or no file can have this name.
    """
    if "\0" in name:
        raise UsageError(f"{name}: a path holds no NUL character")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}: no such user") from error


def real_path(name: str) -> Path:
    """As `local_path`, absolute and without links.

    Raises:
        UsageError: Its links lead in a circle, or no record can hold its name, too.
    """
    path = local_path(name)
    try:
        return Path(_recordable(str(path.resolve())))
    except (RuntimeError, OSError) as error:
        raise UsageError(f"{name} cannot be read: its links lead in a circle, or its name is too long") from error


def _recordable(name: str) -> str:
    """The same name, if it is UTF-8: records, which are JSON, hold no other."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name!a} is not UTF-8, and no record can hold such a name: rename it") from error
    return name


@dataclass(frozen=True)
class FileDigest:
    """What a file holds: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def digest_file(path: Path) -> FileDigest:
    """Read the file once. Raises OSError, and StorageUnavailableError for a disk that does not answer."""
    with reading(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), sha256)
