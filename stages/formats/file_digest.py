"""Local files that a user names: where they are, and their size and sha256, as records keep them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UsageError
from stages.formats.disk_errors import reading


def local_path(name: str) -> Path:
    """The path that a user wrote, with ~ expanded. Raises UsageError for a ~user who is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}: no such user") from error


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
