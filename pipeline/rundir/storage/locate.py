"""From the name of a run directory, as people write it, to the storage behind it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.bucket import BucketStorage
from pipeline.rundir.storage.local import FolderStorage
from pipeline.rundir.storage.object_client import Objects, is_address
from stages.machine.cache import cache_dir

Place = str | Path | Storage


def locate(place: Place) -> Storage:
    """The storage of a folder or of an address like s3://bucket/prefix; a storage is given back as it is.

    Raises UnsupportedPlace for other addresses, and where what they need is not installed or not configured.
    """
    if not isinstance(place, str | Path):
        return place
    if isinstance(place, str) and is_address(place):
        return BucketStorage(Objects(place), working_folder(place))
    return FolderStorage(Path(place))


def working_folder(address: str) -> Path:
    """Where a run in a bucket is worked on, on this machine: in the cache, named by its address."""
    return cache_dir() / "buckets" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def scratch_folder(scratch_dir: Path, storage: Storage) -> Path:
    """The folder of one run on a scratch disk that many may share."""
    return scratch_dir.absolute() / hashlib.sha256(storage.label.encode()).hexdigest()[:16]


def beside(place: str | Path, suffix: str) -> str | Path | None:
    """The place of another run beside this one, with a suffix to its name; None where there is nothing beside."""
    if isinstance(place, str) and is_address(place):
        return f"{place.rstrip('/')}-{suffix}"
    folder = Path(place)
    folder = folder.absolute() if folder.name else folder.resolve()
    return folder.with_name(f"{folder.name}-{suffix}") if folder.name else None
