"""Disks that fail: in place of the one object through which all writes pass (`pipeline.rundir.filesystem.calls`)."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.rundir import filesystem

CHANGES = (*("create", "open_to_append", "write", "flush", "link", "rename", "unlink", "make_folder", "remove_folder"),)


class Crash(BaseException):
    """The process is gone: nothing in it can catch this, and nothing it does afterwards reaches the disk."""


@contextmanager
def using(calls: filesystem.Calls) -> Iterator[None]:
    """All writes pass through `calls` meanwhile."""
    before = filesystem.calls
    filesystem.calls = calls
    try:
        yield
    finally:
        filesystem.calls = before


class Unflushed(filesystem.Calls):
    """A disk that says at once that it has flushed, as no test here takes the real power away."""

    def flush(self, descriptor: int) -> None:
        """Said, not done."""


class Counting(Unflushed):
    """Counts the operations that change a disk; at number `at`, `strike` is called before it."""

    def __init__(self, at: int = -1) -> None:
        self.num_done, self.at = 0, at
        self.names: list[str] = []

    def strike(self, name: str) -> None:
        """Before operation number `at`."""

    def note(self, name: str, *args: object) -> None:
        """Before any operation."""
        if self.num_done == self.at:
            self.strike(name)
        self.names.append(name)
        self.num_done += 1


def _counted(name: str):
    original = getattr(Unflushed, name)

    def call(self, *args):
        self.note(name, *args)
        return original(self, *args)

    return call


for _name in CHANGES:
    setattr(Counting, _name, _counted(_name))


class KilledAt(Counting):
    """The process dies before operation number `at`; what it did before stays, flushed or not."""

    is_dead = False

    def note(self, name: str, *args: object) -> None:
        if self.is_dead:
            raise Crash
        super().note(name, *args)

    def strike(self, name: str) -> None:
        self.is_dead = True
        raise Crash


class FailingAt(Counting):
    """Operation number `at`, of a kind that can, fails with an errno, and so do `num_more` after it."""

    def __init__(self, at: int, number: int, kinds: tuple[str, ...], lasts: bool) -> None:
        super().__init__(at)
        self.number, self.kinds, self.lasts = number, kinds, lasts
        self.has_failed = False

    def note(self, name: str, *args: object) -> None:
        is_due = self.num_done == self.at or (self.lasts and self.has_failed)
        if name in self.kinds:
            if is_due:
                self.has_failed = True
                raise OSError(self.number, os.strerror(self.number))
            self.num_done += 1


NO_SPACE, BROKEN = errno.ENOSPC, errno.EIO


@dataclass(eq=False)
class _File:
    durable: bytes | None = None  # what a flush has brought to the medium; None: never flushed
    path: Path | None = None  # where its present contents can be read


@dataclass(eq=False)
class _Folder:
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    names: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, str, _File | _Folder | None]] = field(default_factory=list)  # since its last flush


class PowerCutAt(Counting):
    """The power goes before operation number `at`: of what was not flushed, anything may be there or not.

    A file's contents are safe once it was flushed, a name once its folder was. Of the rest each write is kept, dropped
    or garbled, each name kept or dropped, by the seed.
    """

    def __init__(self, root: Path, at: int, seed: int) -> None:
        super().__init__(at)
        self.root, self.random = root, random.Random(seed)
        self.is_dead = False
        self._top = _scan(root) if root.exists() else _Folder()
        self._open: dict[int, tuple[_File, Path]] = {}

    def note(self, name: str, *args: object) -> None:
        if self.is_dead:
            raise Crash
        super().note(name, *args)

    def strike(self, name: str) -> None:
        self.is_dead = True
        raise Crash

    def survivors(self) -> None:
        """Leave in the folder what the medium holds."""
        rescued = self.root.with_name(self.root.name + ".survived")
        # The folder that the run directory lies in is somebody else's, and durable.
        self._write(self._top, rescued, {})
        shutil.rmtree(self.root, ignore_errors=True)
        if rescued.exists():
            rescued.rename(self.root)

    def create(self, path: Path) -> int:
        self.note("create")
        descriptor = filesystem.Calls.create(self, path)
        self._add(path, _File(path=path))
        self._open[descriptor] = (self._at(path), path)  # type: ignore[assignment]
        return descriptor

    def open_to_append(self, path: Path) -> int:
        self.note("open_to_append")
        is_new = not path.exists()
        descriptor = filesystem.Calls.open_to_append(self, path)
        if is_new:
            self._add(path, _File(path=path))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self.note("write")
        return filesystem.Calls.write(self, descriptor, data)

    def flush(self, descriptor: int) -> None:
        self.note("flush")
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        node = self._at(path)
        if isinstance(node, _Folder):
            node.durable, node.pending = dict(node.names), []
        elif node is not None:
            node.durable = path.read_bytes()

    def link(self, source: Path, target: Path) -> None:
        self.note("link")
        filesystem.Calls.link(self, source, target)
        self._add(target, self._at(source))

    def rename(self, source: Path, target: Path) -> None:
        self.note("rename")
        node = self._at(source)
        filesystem.Calls.rename(self, source, target)
        self._drop(source)
        self._add(target, node)

    def unlink(self, path: Path) -> None:
        self.note("unlink")
        filesystem.Calls.unlink(self, path)
        self._drop(path)

    def make_folder(self, path: Path) -> None:
        self.note("make_folder")
        filesystem.Calls.make_folder(self, path)
        self._add(path, _Folder())

    def remove_folder(self, path: Path) -> None:
        self.note("remove_folder")
        filesystem.Calls.remove_folder(self, path)
        self._drop(path)

    def _parts(self, path: Path) -> tuple[str, ...] | None:
        absolute = path.absolute()
        return absolute.relative_to(self.root).parts if absolute.is_relative_to(self.root) else None

    def _at(self, path: Path) -> _File | _Folder | None:
        node: _File | _Folder | None = self._top
        parts = self._parts(path)
        if parts is None:
            return None
        for part in parts:
            node = node.names.get(part) if isinstance(node, _Folder) else None
        return node

    def _add(self, path: Path, node: _File | _Folder | None) -> None:
        folder = self._at(path.parent)
        if isinstance(folder, _Folder) and node is not None and self._parts(path):
            folder.names[path.name] = node
            folder.pending.append(("add", path.name, node))
            self._place(node, path)

    def _drop(self, path: Path) -> None:
        folder = self._at(path.parent)
        if isinstance(folder, _Folder) and self._parts(path):
            node = folder.names.pop(path.name, None)
            if isinstance(node, _File) and node.path == path:
                # Its bytes may be needed yet: another name, or a name that the medium still has.
                other = next((p for p in self._paths_of(node)), None)
                node.path = other
            folder.pending.append(("drop", path.name, None))

    def _place(self, node: _File | _Folder, path: Path) -> None:
        if isinstance(node, _File):
            node.path = path
        else:
            for name, inner in node.names.items():
                self._place(inner, path / name)

    def _paths_of(self, wanted: _File) -> Iterator[Path]:
        def walk(folder: _Folder, path: Path) -> Iterator[Path]:
            for name, node in folder.names.items():
                if node is wanted:
                    yield path / name
                elif isinstance(node, _Folder):
                    yield from walk(node, path / name)

        return walk(self._top, self.root)

    def _write(self, folder: _Folder, target: Path, written: dict[_File, Path]) -> None:
        target.mkdir()
        names = dict(folder.durable)
        for kind, name, node in folder.pending:
            if self.random.random() < 0.5:
                continue
            if kind == "drop":
                names.pop(name, None)
            elif node is not None:
                names[name] = node
        for name, node in names.items():
            path = target / name
            if isinstance(node, _Folder):
                self._write(node, path, written)
            elif node in written:
                os.link(written[node], path)
            else:
                path.write_bytes(self._contents(node))
                written[node] = path

    def _contents(self, file: _File) -> bytes:
        now = file.path.read_bytes() if file.path is not None and file.path.is_file() else (file.durable or b"")
        if now == file.durable:
            return now
        choice = self.random.randrange(4)
        if choice == 0:
            return now
        if choice == 1:
            return file.durable or b""
        if choice == 2:
            return now[: self.random.randrange(len(now) + 1)]
        return bytes(self.random.randrange(256) for _ in range(len(now)))


def _scan(folder: Path) -> _Folder:
    """All that is there, taken as durable."""
    found, inodes = _Folder(), {}

    def walk(path: Path, node: _Folder) -> None:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink():
                inner: _File | _Folder = _Folder()
                walk(child, inner)  # type: ignore[arg-type]
            else:
                inner = inodes.setdefault(child.stat().st_ino, _File(child.read_bytes(), child))
            node.names[child.name] = inner
        node.durable = dict(node.names)

    walk(folder, found)
    return found
