"""A run directory in an object store: S3, Google Cloud Storage, Azure.

Payloads are written to a working folder on this machine, hashed on the way, and uploaded when their step commits; the
commit record is then created by one conditional request. What is read comes from the working folder if a copy is there,
and is fetched otherwise: a machine with an empty disk resumes where another one vanished. The working folder
holds nothing that the bucket, or a replay, cannot restore.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

from pipeline.errors import BucketError, FileGone, NotARun
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import FileDigest
from pipeline.rundir.records import PayloadFile, relative_path
from pipeline.rundir.storage.base import Disk
from pipeline.rundir.storage.object_client import Objects
from stages.machine.cache import cache_dir

# transformers opens no folder without it: written last and deleted first, it makes a view whole or useless.
_OPENER = "config.json"


def working_folder(address: str) -> Path:
    """Where a run in a bucket is worked on, on this machine: in the cache, named by its address."""
    return cache_dir() / "buckets" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


class BucketStorage:
    """`pipeline.rundir.storage.base.Storage` on an object store.

    folder: on this machine, for what is being written and for copies of what was read. scratch: a folder for
    activations alone, which then never reach the bucket.
    """

    title = "bucket"
    help = "An object store: S3, Google Cloud Storage or Azure."

    def __init__(self, objects: Objects, folder: Path, scratch: Path | None = None) -> None:
        self.objects, self.label = objects, objects.address
        self.folder, self.scratch = folder.absolute(), scratch
        self._same_as: dict[str, str] = {}  # of files written here: the key that has these bytes in the bucket already
        self._lines: dict[str, bytes] = {}

    @classmethod
    def at(cls, place: str) -> Self:
        return cls(Objects(place), working_folder(place))

    def use_scratch(self, folder: Path) -> None:
        self.scratch = folder

    @property
    def disks(self) -> tuple[Disk, ...]:
        working = Disk(f"the working folder {self.folder}", self.folder, True, self.scratch is None)
        if self.scratch is None:
            return (working,)
        return (working, Disk(f"the scratch folder {self.scratch}", self.scratch, False, True))

    def is_free(self) -> bool:
        return not self.objects.names("")

    def prepare(self) -> None:
        if not self.is_free():
            raise NotARun(f"{self.label} is not empty and holds no run: nothing was written. Name another --run-dir")

    def exists(self, key: str) -> bool:
        return self._is_on_scratch(key) or self.objects.exists(relative_path(key))

    def names(self, key: str) -> list[str]:
        found = set(self.objects.names(relative_path(key)))
        for root in self._local_roots():
            found.update(path.name for path in _children(root / key))
        return sorted(found)

    def sizes(self, key: str) -> dict[str, int]:
        found = self.objects.sizes(relative_path(key))
        if self.scratch is not None:
            found.update(filesystem.sizes_under(self.scratch, key))
        return found

    def read(self, key: str) -> bytes:
        return self.objects.read(relative_path(key))

    def load(self, key: str) -> bytes:
        return filesystem.read_file(self.local(key))

    def local(self, key: str) -> Path:
        for root in self._local_roots():
            path = root / relative_path(key)
            if path.is_file() and not path.is_symlink():
                return path
        data = self.objects.read(key)
        path = self.folder / key
        filesystem.make_folder(path.parent)
        filesystem.replace_file(path, data)
        return path

    def digest(self, key: str) -> FileDigest:
        if self._is_on_scratch(key):
            assert self.scratch is not None
            return filesystem.hash_file(self.scratch / key)
        return filesystem.hash_bytes(self.objects.read(relative_path(key)))

    def drop_copy(self, key: str) -> bool:
        path = self.folder / relative_path(key)
        was_there = path.is_file() and not self._is_on_scratch(key)
        if was_there:
            filesystem.remove_file(path)
        return was_there

    def create(self, key: str, data: bytes) -> None:
        self.objects.create(relative_path(key), data)

    def replace(self, key: str, data: bytes) -> None:
        self.objects.write(relative_path(key), data)

    def append(self, key: str, line: str) -> None:
        """Rewrites the object: a run has few lines. Those that another process adds meanwhile may be lost."""
        if key not in self._lines:
            try:
                self._lines[key] = self.objects.read(key)
            except FileGone:
                self._lines[key] = b""
        self._lines[key] += line.encode() + b"\n"
        self.objects.write(key, self._lines[key])

    def new_folder(self, key: str, *, is_bulky: bool = False, with_parents: bool = False) -> Path:
        root = self.scratch if is_bulky and self.scratch is not None else self.folder
        path = root / relative_path(key)
        if with_parents or root is self.scratch:
            filesystem.make_folder(path.parent)
        filesystem.make_new_folder(path)
        return path

    def written(self, key: str) -> set[str]:
        return {found for root in self._local_roots() for found in filesystem.sizes_under(root, relative_path(key))}

    def same_as(self, key: str, source: str) -> None:
        self._same_as[key] = source

    def keep(self, key: str) -> None:
        if not (self.folder / relative_path(key)).is_dir():
            raise FileGone(f"{self.folder / key} is not there any more")
        self._upload(filesystem.sizes_under(self.folder, key), key, key)

    def put_back(self, source: str, target: str) -> None:
        if self.scratch is not None and (self.scratch / relative_path(source)).exists():
            old = self.scratch / relative_path(target)
            filesystem.make_folder(old.parent)
            filesystem.remove_tree(old)
            filesystem.rename(self.scratch / source, old)
        new = self.folder / relative_path(source)
        if new.exists():
            sizes = filesystem.sizes_under(self.folder, source)
            superfluous = self.objects.sizes(target).keys() - {target + key.removeprefix(source) for key in sizes}
            self._upload(sizes, source, target)
            self.objects.delete(superfluous)
            filesystem.remove_tree(self.folder / relative_path(target))
            filesystem.make_folder((self.folder / target).parent)
            filesystem.rename(new, self.folder / target)

    def set_record_aside(self, key: str) -> None:
        folder, _, name = relative_path(key).rpartition("/")
        self.objects.copy([(key, f"{folder}/.{name}.{secrets.token_hex(4)}.old")])
        self.objects.delete([key])

    def remove(self, key: str) -> None:
        self.objects.delete(self.objects.sizes(relative_path(key)) or [key])
        for root in self._local_roots():
            path = root / key
            if path.is_dir() and not path.is_symlink():
                filesystem.remove_tree(path)
            else:
                filesystem.remove_file(path)

    def tidy(self, settled: Collection[str], attempts: Collection[str]) -> None:
        """Delete damaged records that were renamed. A bucket has no partial objects."""
        wanted = {key.rpartition("/")[2] for key in settled}
        stale = []
        for name in self.objects.names("commits"):
            leftover = filesystem.LEFTOVER.match(name)
            if leftover and leftover["name"] in wanted:
                stale.append(f"commits/{name}")
        self.objects.delete(stale)

    def publish(self, view: str, sources: Mapping[str, PayloadFile]) -> Path:
        if not self.is_published(view, sources):
            targets = {f"{view}/{relative_path(inner)}": file.path for inner, file in sources.items()}
            opener = f"{view}/{_OPENER}"
            there = self.objects.sizes(view)
            self.objects.delete(key for key in [opener, *there] if key in there and not _is_card(key, view))
            self.objects.copy((source, target) for target, source in targets.items() if target != opener)
            self.objects.copy((source, target) for target, source in targets.items() if target == opener)
        return self._local_view(view, sources)

    def is_published(self, view: str, sources: Mapping[str, PayloadFile]) -> bool:
        sizes = self.objects.sizes(relative_path(view))
        return all(sizes.get(f"{view}/{inner}") == file.size for inner, file in sources.items())

    def drop_copies(self) -> None:
        filesystem.remove_tree(self.folder)

    def _upload(self, sizes: Mapping[str, int], source: str, target: str) -> None:
        """Bring files from the working folder into the bucket and see that they are there."""
        moved = {key: target + key.removeprefix(source) for key in sizes}
        copies = [(self._same_as[key], new) for key, new in moved.items() if key in self._same_as]
        self.objects.copy(copies)
        self.objects.upload((new, self.folder / key) for key, new in moved.items() if key not in self._same_as)
        there = self.objects.sizes(target)
        for key, new in moved.items():
            if there.get(new) != sizes[key]:
                raise BucketError(f"{self.label}/{new} was uploaded, and is not there with its {sizes[key]} bytes")
            self._same_as.pop(key, None)

    def _local_view(self, view: str, sources: Mapping[str, PayloadFile]) -> Path:
        """The same as a folder on this machine."""
        shown = self.folder / relative_path(view)
        filesystem.remove_tree(shown)
        for inner, file in sources.items():
            filesystem.make_folder((shown / inner).parent)
            filesystem.link_or_copy(self.local(file.path), shown / inner)
        return shown

    def _local_roots(self) -> tuple[Path, ...]:
        return (self.folder,) if self.scratch is None else (self.scratch, self.folder)

    def _is_on_scratch(self, key: str) -> bool:
        return self.scratch is not None and (self.scratch / relative_path(key)).exists()


def _is_card(key: str, view: str) -> bool:
    return key == f"{view}/README.md"


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
