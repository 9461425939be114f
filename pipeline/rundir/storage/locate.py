"""From the name of a run directory, as people write it, to the storage behind it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pipeline.errors import UnsupportedPlace
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.registry import LOCAL, STORAGES

Place = str | Path | Storage


def locate(place: Place) -> Storage:
    """The storage of a folder or of an address such as s3://bucket/prefix; a storage is returned as it is.

    Raises:
        UnsupportedPlace: The name is empty, the address is of another kind, or what it needs is not installed or not
            configured.
    """
    if not isinstance(place, str | Path):
        return place
    require_named(place)
    if isinstance(place, str) and is_address(place):
        return STORAGES.get(place.partition("://")[0]).at(place)
    return STORAGES.get(LOCAL).at(str(place))


def require_named(place: str | Path) -> None:
    """Raise UnsupportedPlace for an empty name, which would mean the working directory."""
    if place == "":
        raise UnsupportedPlace("the name of the run directory is empty: give a folder, or leave it out for the default")


def is_address(place: str) -> bool:
    """Whether a run directory's name is an address, not a folder. Raises UnsupportedPlace for an unknown scheme."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", place)
    if match is None:
        return False
    if match[1] == LOCAL or match[1] not in STORAGES:
        known = ", ".join(f"{scheme}://..." for scheme in STORAGES.names if scheme != LOCAL)
        raise UnsupportedPlace(f"{place}: a run directory is a folder, or {known}")
    return True


def scratch_folder(scratch_dir: Path, storage: Storage) -> Path:
    """The folder of one run on a scratch disk that many runs may share."""
    return scratch_dir.absolute() / hashlib.sha256(storage.label.encode()).hexdigest()[:16]


def beside(place: str | Path, suffix: str) -> str | Path | None:
    """The place of another run beside this one, with a suffix to its name; None if the place has no name."""
    if isinstance(place, str) and is_address(place):
        return f"{place.rstrip('/')}-{suffix}"
    folder = Path(place)
    folder = folder.absolute() if folder.name else folder.resolve()
    return folder.with_name(f"{folder.name}-{suffix}") if folder.name else None
