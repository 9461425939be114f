"""What the control groups of Linux leave to this process: in a container, less than the machine has.

A group is bound by every group above it as well. Version 2 has one tree, version 1 one for each kind of resource; a
container sees its own group as the root of the tree, or the path of its group on the host, which it does not have.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 writes the largest number of whole pages for "no limit".
_NO_LIMIT = 2**60
_MOUNT = Path("sys/fs/cgroup")


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that this process may take beside what its groups use; None: no group has a limit.

    Cached file contents, which the system drops when memory is short, do not count as used.

    Args:
        root: Where /proc and /sys are.
    """
    left = [
        limit - max(used - _droppable(folder), 0)
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        for folder in _groups(root)
        if (limit := _number(folder / names[0])) is not None
        and limit < _NO_LIMIT
        and (used := _number(folder / names[1])) is not None
    ]
    return max(min(left), 0) if left else None


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's memory groups, and of all groups above them."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [root / _MOUNT, root / _MOUNT / "unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / _MOUNT / controllers, root / _MOUNT / "memory"]
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _droppable(folder: Path) -> int:
    """Bytes of a group's inactive file cache."""
    for name in ("total_inactive_file", "inactive_file"):  # version 1 has both, and the first counts groups below
        for line in _lines(folder / "memory.stat"):
            key, _, value = line.partition(" ")
            if key == name and value.isdigit():
                return int(value)
    return 0


def _number(path: Path) -> int | None:
    """The number in a file of one line; None: there is none, as where it says "max"."""
    line = " ".join(_lines(path)).strip()
    return int(line) if line.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
