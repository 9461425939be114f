"""Storage of a run directory in a folder, with its activations on a second disk if the user names one."""

from __future__ import annotations

import contextlib
import shutil
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

from pipeline.errors import DamagedData, FileGone, NotARun, UnsupportedPlace
from pipeline.rundir import filesystem
from pipeline.rundir.records import PayloadFile, relative_path
from pipeline.rundir.storage.base import Disk

MANIFEST = "run.json"
# The heartbeat of this very process may be writing it now: its temporaries are left alone until they are this old.
_LEASE, _YOUNG_S = "lease.json", 600.0


class FolderStorage:
    """`pipeline.rundir.storage.base.Storage` on a local or network file system.

    scratch: a folder for activations alone, which may vanish at any time.
    """

    title = "folder"
    help = "A folder on a local or network file system."

    def __init__(self, folder: Path, scratch: Path | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.label = str(self.folder)
        self._set_roots(scratch)

    @classmethod
    def at(cls, place: str) -> Self:
        return cls(Path(place))

    def _set_roots(self, scratch: Path | None) -> None:
        self.scratch = scratch
        self._roots = (self.folder,) if scratch is None else (scratch, self.folder)
        try:
            self._real_roots = tuple(root.resolve() for root in self._roots)
        except (RuntimeError, ValueError) as error:  # links in a circle, a NUL character
            raise UnsupportedPlace(f"{self.label} cannot be a folder: {error}") from error

    def use_scratch(self, folder: Path) -> None:
        self._set_roots(folder)

    @property
    def disks(self) -> tuple[Disk, ...]:
        run = Disk(f"the disk of {self.label}", self.folder, True, self.scratch is None)
        if self.scratch is None:
            return (run,)
        return (run, Disk(f"the scratch folder {self.scratch}", self.scratch, False, True))

    def is_free(self) -> bool:
        if not self.folder.exists():
            return True
        if not self.folder.is_dir():
            return False
        # A disk mounted for the run may have its own lost+found.
        return all(
            child.name == "lost+found"
            or ((match := filesystem.LEFTOVER.match(child.name)) and match["name"] == MANIFEST)
            for child in self.folder.iterdir()
        )

    def prepare(self) -> None:
        in_the_way = next((p for p in (self.folder, *self.folder.parents) if p.exists() and not p.is_dir()), None)
        if in_the_way is not None:
            raise NotARun(
                f"no run can be made at {self.folder}: {in_the_way} is a file. Name a new folder by --run-dir"
            )
        filesystem.make_folder(self.folder)

    def exists(self, key: str) -> bool:
        return any((root / relative_path(key)).exists() for root in self._roots)

    def names(self, key: str) -> list[str]:
        found: set[str] = set()
        for root in self._roots:
            try:
                found.update(path.name for path in (root / relative_path(key)).iterdir())
            except FileNotFoundError:
                continue
            except NotADirectoryError:
                raise DamagedData(f"{root / key} is a file where a folder belongs: move it elsewhere") from None
        return sorted(found)

    def sizes(self, key: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for root in reversed(self._roots):  # files on the scratch disk win, as in `load`
            found.update(filesystem.sizes_under(root, relative_path(key)))
        return found

    def read(self, key: str) -> bytes:
        path = self.folder / relative_path(key)
        self._require_inside(path.parent)
        return filesystem.read_file(path)

    def load(self, key: str) -> bytes:
        return filesystem.read_file(self._inside(key))

    def local(self, key: str) -> Path:
        return self._inside(key)

    def digest(self, key: str) -> filesystem.FileDigest:
        return filesystem.hash_file(self._inside(key))

    def drop_copy(self, key: str) -> bool:
        return False

    def drop_copies(self) -> None:
        """There are none: what is read is the run directory itself."""

    def create(self, key: str, data: bytes) -> None:
        path = self.folder / relative_path(key)
        self._require_inside(path.parent)
        filesystem.make_folder(path.parent)
        filesystem.write_new(path, data)

    def replace(self, key: str, data: bytes) -> None:
        path = self.folder / relative_path(key)
        self._require_inside(path.parent)  # a link in the file's own place is replaced, never followed
        filesystem.make_folder(path.parent)
        filesystem.replace_file(path, data, self.folder)

    def append(self, key: str, line: str) -> None:
        filesystem.append_line(self.folder / relative_path(key), line)

    def new_folder(self, key: str, *, is_bulky: bool = False, with_parents: bool = False) -> Path:
        path = (self._roots[0] if is_bulky else self.folder) / relative_path(key)
        self._require_inside(path.parent)
        if with_parents or (is_bulky and self.scratch is not None):
            filesystem.make_folder(path.parent)
        filesystem.make_new_folder(path)
        return path

    def same_as(self, key: str, source: str) -> None:
        """A hard link already is."""

    def written(self, key: str) -> set[str]:
        return set(self.sizes(key))

    def keep(self, key: str) -> None:
        path = self.folder / relative_path(key)
        filesystem.flush_tree(path)
        filesystem.flush_folder(path.parent)

    def put_back(self, source: str, target: str) -> None:
        for root in self._roots:
            new, old = root / relative_path(source), root / relative_path(target)
            if not new.exists():
                continue
            self._require_inside(old.parent)
            filesystem.make_folder(old.parent)
            filesystem.flush_tree(new)
            self.remove(target)
            filesystem.rename(new, old)
            filesystem.flush_folder(old.parent)

    def set_record_aside(self, key: str) -> None:
        path = self.folder / relative_path(key)
        filesystem.set_aside(path)
        filesystem.flush_folder(path.parent)

    def remove(self, key: str) -> None:
        self._inside(key)
        for root in self._roots:
            path = root / relative_path(key)
            try:
                # Looked at once: what is not there now may be a folder of another process in a moment.
                is_folder = stat.S_ISDIR(path.lstat().st_mode)
            except FileNotFoundError:
                continue
            if not is_folder:
                filesystem.remove_file(path)
            else:
                # In one step, so that a payload is there or released, never half of it.
                with contextlib.suppress(FileGone):  # another process does the same
                    filesystem.remove_tree(filesystem.set_aside(path))

    def tidy(self, settled: Collection[str], attempts: Collection[str]) -> None:
        names = {Path(key).name for key in settled}
        for path in _children(self.folder / "commits"):
            leftover = filesystem.LEFTOVER.match(path.name)
            if leftover and leftover["name"] in names:
                filesystem.remove_file(path)
        for root in self._roots:
            for folder in [root, root / "data", root / "progress", *(root / key for key in attempts)]:
                for path in _children(folder):
                    leftover = filesystem.LEFTOVER.match(path.name)
                    if leftover and not (leftover["name"] == _LEASE and _is_young(path)):
                        _remove(path)

    def publish(self, view: str, sources: Mapping[str, PayloadFile]) -> Path:
        shown = self._inside(view)
        if self.is_published(view, sources):
            return shown
        temporary = filesystem.temporary_folder(shown)
        for inner, file in sources.items():
            filesystem.make_folder((temporary / relative_path(inner)).parent)
            filesystem.link_or_copy(self._inside(file.path), temporary / inner)
        filesystem.flush_tree(temporary)
        older = filesystem.set_aside(shown) if shown.exists() else None
        filesystem.rename(temporary, shown)
        filesystem.flush_folder(shown.parent)
        if older is not None:
            _remove(older)
        return shown

    def is_published(self, view: str, sources: Mapping[str, PayloadFile]) -> bool:
        shown = self._inside(view)
        return all(_is_same(self._inside(file.path), shown / relative_path(inner)) for inner, file in sources.items())

    def _inside(self, key: str) -> Path:
        """The full path of a key. Raises DamagedData if a link leads it out of the run directory."""
        paths = [root / relative_path(key) for root in self._roots]
        path = next((path for path in paths if path.exists()), paths[-1])
        self._require_inside(path)
        return path

    def _require_inside(self, path: Path) -> None:
        if not any(path.resolve().is_relative_to(root) for root in self._real_roots):
            raise DamagedData(f"{path} leads out of the run directory: it was not followed")


def free_bytes(path: Path) -> int:
    """Room left on the disk where `path` is, or will be."""
    there = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(there).free


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_same(source: Path, shown: Path) -> bool:
    if not shown.is_file():
        return False
    try:
        return source.samefile(shown) or filesystem.hash_file(source) == filesystem.hash_file(shown)
    except (FileNotFoundError, FileGone):
        return False


def _is_young(path: Path) -> bool:
    """Whether a temporary was written just now, or has been renamed since."""
    try:
        return time.time() - path.lstat().st_mtime < _YOUNG_S
    except FileNotFoundError:
        return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        filesystem.remove_tree(path)
    else:
        filesystem.remove_file(path)
