"""Size and sha256 of a file, as records of models and data sets keep them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileDigest:
    """What a file holds: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def digest_file(path: Path) -> FileDigest:
    """Read the file once. Raises OSError."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), sha256)
