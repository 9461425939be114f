"""Interface of a storage: what a run directory needs from the place where it is stored.

A key is a plain relative path inside the run directory, with "/" between its parts, as the records have it.
Payloads are always written to a local folder first (`new_folder`), hashed on the way, and then kept (`keep`): a
folder on a disk flushes them, a bucket uploads them. What is read comes back as a local file or as bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

from pipeline.rundir.records import PayloadFile
from stages.formats.file_digest import FileDigest


@dataclass(frozen=True)
class Disk:
    """A disk of this machine that a run fills."""

    label: str
    folder: Path  # may not exist yet
    holds_weights: bool
    holds_activations: bool


class Storage(Protocol):
    """Where one run directory is stored. Errors are those of `pipeline.errors`; FileGone for what does not exist.

    `pipeline.testing.storages` checks an implementation.
    """

    title: ClassVar[str]  # for people
    help: ClassVar[str]  # one line
    label: str  # as people name the run directory: a path or an address
    folder: Path  # local: where new payloads are written; the run directory itself, if that is local

    @classmethod
    def at(cls, place: str) -> Self:
        """The storage at a place as the user names it. Raises UnsupportedPlace if it cannot be used."""
        ...

    def is_free(self) -> bool:
        """Whether a run may begin here: the place is empty, or has only leftovers of a crash while one began."""
        ...

    def prepare(self) -> None:
        """Make the empty run directory. Raises NotARun where none can be."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is a file or folder of this name, durable or not."""
        ...

    def names(self, key: str) -> list[str]:
        """Names directly in a folder, sorted; none if the folder does not exist."""
        ...

    def sizes(self, key: str) -> dict[str, int]:
        """The size of every file under a folder, at any depth, by its key; none if the folder does not exist."""
        ...

    def read(self, key: str) -> bytes:
        """A file's bytes as they are in the run directory now."""
        ...

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks of this machine that the run needs room on."""
        ...

    def use_scratch(self, folder: Path) -> None:
        """Keep activations in this folder from now on; it is made when there are some, and may vanish at any time."""
        ...

    def load(self, key: str) -> bytes:
        """A payload file's bytes; a bucket may answer from a local copy. The caller checks them."""
        ...

    def local(self, key: str) -> Path:
        """A payload file as a local one, for libraries that want a path. The caller checks it."""
        ...

    def digest(self, key: str) -> FileDigest:
        """Size and sha256 of a payload file as it is in the run directory now, whatever copies there are."""
        ...

    def drop_copy(self, key: str) -> bool:
        """Forget the local copy of a payload file that turned out damaged; False if there is no such thing."""
        ...

    def drop_copies(self) -> None:
        """Forget all local copies: nothing more will be read."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Make a file, whole and durable, in one step that only one process can win. Raises FileExists."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Make or replace a file, durably; a reader sees the old bytes or the new."""
        ...

    def append(self, key: str, line: str) -> None:
        """Add a line to a file for people; it may be lost."""
        ...

    def new_folder(self, key: str, *, is_bulky: bool = False, with_parents: bool = False) -> Path:
        """A new local folder for what is to be written under this key; FileExists if there is one.

        is_bulky: for activations, which can be rebuilt: they may lie on a scratch disk, and are then never kept.
        with_parents: make those above it, durably; otherwise FileGone where there are none.
        """
        ...

    def same_as(self, key: str, source: str) -> None:
        """Tell that the file just written under `key` has the bytes of the committed one at `source`."""
        ...

    def written(self, key: str) -> set[str]:
        """The keys of all files that were written under this one, wherever they lie."""
        ...

    def keep(self, key: str) -> None:
        """Return once everything written under this key is durable, except files on a scratch disk."""
        ...

    def put_back(self, source: str, target: str) -> None:
        """Move the folder that was written under `source` to `target`, durably, in place of what is there."""
        ...

    def set_record_aside(self, key: str) -> None:
        """Take a damaged record's name away without destroying its bytes."""
        ...

    def remove(self, key: str) -> None:
        """Delete a file or folder; the name goes in one step, so that a folder is there or not. Missing is fine."""
        ...

    def tidy(self, settled: Collection[str], attempts: Collection[str]) -> None:
        """Delete temporaries that crashes left: of the records `settled`, beside views, in the folders `attempts`."""
        ...

    def publish(self, view: str, sources: Mapping[str, PayloadFile]) -> Path:
        """The local folder that shows the files `sources` ({path in the view: file}), and nothing else.

        The view of that name in the run directory appears complete or not at all, and is replaced as a whole.
        """
        ...

    def is_published(self, view: str, sources: Mapping[str, PayloadFile]) -> bool:
        """Whether the view shows all of these files."""
        ...
