"""Converted models in the user's cache: weights under what they were made from, other files under their contents."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import ResourceError
from stages.machine.cache import cache_dir

# Raised by one when a conversion changes what it writes.
_VERSION = 2


@contextmanager
def converted(digest: str) -> Iterator[tuple[Path, bool]]:
    """A folder to fill, and whether it is new; it takes its place in the cache only once it is full."""
    final = cache_dir() / "models" / f"{digest[:24]}-v{_VERSION}"
    if final.is_dir():
        yield final, False
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise ResourceError(
            f"the cache {cache_dir()} cannot be written ({error.strerror}): set LAMPCTL_CACHE to a folder that can"
        ) from error
    try:
        yield temporary, True
        _take_place(temporary, final)
    except OSError as error:
        raise ResourceError(f"no room to convert the model in {cache_dir()}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, final: Path) -> None:
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        temporary.rename(final)
    except OSError:
        # Another process was first, with the same contents.
        if not final.is_dir():
            raise


def cached(target: Path) -> Path:
    """The place in the cache that a folder given by `converted` has taken."""
    if not target.name.startswith("."):
        return target
    return target.parent / target.name.removeprefix(".").rpartition(".")[0]


def with_files(weights: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A folder in the cache with converted weights and the model's other files, as they are now.

    A folder for each state of these files: one that is edited at the source is read anew, and a run that is under way
    keeps what it began with.

    Args:
        weights: Folder of the cache that holds nothing but converted weights. Its files are linked, not copied.
        files: Names, with slashes, and contents.
    """
    contents = dict(files)
    listing = [f"{hashlib.sha256(data).hexdigest()} {name}" for name, data in sorted(contents.items())]
    key = hashlib.sha256("\0".join([f"files of {weights.name}", *listing]).encode(errors="surrogateescape"))
    with converted(key.hexdigest()) as (target, is_new):
        if is_new:
            for path in sorted(weights.iterdir()):
                (target / path.name).symlink_to(Path("..", weights.name, path.name))
            for name, data in contents.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(data)
    return cached(target)
