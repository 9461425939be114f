"""Entry points of installed packages, for the registries.

`importlib.metadata` takes 40 ms to be imported and to parse the metadata of every package, and most installations have
no entry for a registry. So this module first looks for the group's name in the files, and asks `importlib.metadata`
only where the name occurs or where folders cannot tell: packages in zip archives, and those of other finders.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def entry_points_of(group: str) -> list[EntryPoint]:
    """The entry points of a group, in alphabetical order. Imports none of the packages."""
    if not may_have_entries(group):
        return []
    from importlib.metadata import entry_points

    return sorted(entry_points(group=group), key=lambda point: point.name)


def packages_of_modules() -> dict[str, str]:
    """The package that adds entries to a registry, by the top-level name of the modules that hold them."""
    if not may_have_entries("lampctl."):
        return {}
    from importlib.metadata import distributions

    return {
        point.module.partition(".")[0]: dist.name
        for dist in distributions()
        for point in dist.entry_points
        if point.group.startswith("lampctl.")
    }


def may_have_entries(group: str) -> bool:
    """Whether a package on `sys.path` may have an entry in a group that begins with this. False: there is none."""
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    if any(hasattr(finder, "find_distributions") for finder in others):
        return True
    declared = [_declarations(entry) for entry in sys.path]
    return any(text is None or group.encode() in text for text in declared)


def _declarations(entry: str) -> bytes | None:
    """The text of all ``entry_points.txt`` in an entry of `sys.path`; None for a file, such as a zip archive."""
    folder = os.path.abspath(entry)  # "" is the current folder
    try:
        return _read(folder, os.stat(folder).st_mtime_ns)
    except NotADirectoryError:
        return None
    except OSError:  # as importlib.metadata: a folder that is gone or closed to us has no packages
        return b""


@cache
def _read(folder: str, modified_ns: int) -> bytes:
    """As `_declarations`, kept until a package is added to the folder or removed from it. Raises OSError."""
    is_egg = folder.lower().endswith(".egg")
    suffixes = (".dist-info", ".egg-info", "egg-info") if is_egg else (".dist-info", ".egg-info")
    names = (name for name in os.listdir(folder) if name.lower().endswith(suffixes))
    return b"\n".join(_text_of(os.path.join(folder, name, "entry_points.txt")) for name in names)


def _text_of(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):  # as importlib.metadata
        return b""
