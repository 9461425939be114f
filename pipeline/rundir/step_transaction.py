"""Staging directory for one step. A commit promotes it; otherwise garbage collection removes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DamagedData, FileExists, FileGone, MissingChunk
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import Bytes, FileDigest, FileWriter
from pipeline.rundir.records import Payload, PayloadFile, relative_path
from pipeline.rundir.storage.base import Storage

# torch takes a second to import, and asking how far a run is needs none of it.
if TYPE_CHECKING:
    import torch

    from pipeline.rundir.activation_store import ActivationStream, ScratchStreams

Contents = Bytes | Callable[[FileWriter], object]

_SCRATCH = ".scratch"


class Attempt:
    """Collects the payloads of one step. `RunDirectory.begin` makes one, `RunDirectory.commit` ends it."""

    def __init__(
        self, storage: Storage, step: str, path: Path, number: int, check_superseded: Callable[[], None]
    ) -> None:
        """Start with an empty staging directory.

        Args:
            storage: Where the run is stored.
            step: Name of the step.
            path: The staging directory. No other attempt of any process has its name.
            number: Number of the commit that it is for.
            check_superseded: Raises Superseded if another process has made that commit.
        """
        self.number = number
        self.step = step
        self.path = path
        self._storage = storage
        self._check_superseded = check_superseded
        self._streams: dict[str, ActivationStream] = {}
        self._folders: dict[str, PayloadFolder] = {}
        self._scratch: ScratchStreams | None = None
        self._payloads: dict[str, Payload] | None = None

    @property
    def id(self) -> str:
        """The name of its folder, which no other attempt of any process has."""
        return self.path.name

    def stream(
        self,
        name: str,
        num_samples: int,
        sample_shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        is_precious: bool = False,
    ) -> ActivationStream:
        """A new activation stream, to be filled with all its samples before the step commits.

        is_precious: it belongs beside the weights, even where activations lie on a scratch disk.
        """
        from pipeline.rundir import activation_store

        spec = activation_store.stream_spec(num_samples, sample_shape, dtype)
        try:
            folder = self._new_root(name, is_bulky=not is_precious)
            stream = activation_store.write_stream(folder, spec, self._check_superseded)
        except FileExists:
            raise ValueError(f"{self.step} makes payload {name} twice") from None
        self._streams[name] = stream
        return stream

    def write_file(self, name: str, filename: str, contents: Contents) -> PayloadFile:
        """Make a payload that is one file. `contents`: its bytes, or a function that writes them."""
        return self._new_folder(name, "file").write(filename, contents)

    def folder(self, name: str) -> PayloadFolder:
        """A new payload of several files, to be filled."""
        return self._new_folder(name, "folder")

    def adopt(self, name: str, source: Storage, payload: Payload, *, is_bulky: bool = False) -> Payload:
        """Take a payload of another run, by hard links where the file system has them.

        Args:
            name: Name of the payload here.
            source: Storage of the other run.
            payload: The payload as the other run committed it. Every file is read and hashed first.
            is_bulky: It is an activation stream, which may be stored on a scratch disk.

        Raises:
            DamagedData: A file is not what the other run committed.
        """
        folder = self._new_folder(name, payload.kind, is_bulky=is_bulky)
        for file in payload.files:
            path = source.local(file.path)
            digest = filesystem.hash_file(path)
            if digest != FileDigest(file.size, file.sha256):
                raise DamagedData(f"{path} is damaged: it is not what its run committed. It was not taken over")
            folder._add_link(payload.inner(file), path, digest)
        return folder._seal(payload)

    def scratch(self) -> ScratchStreams:
        """Scratch streams for intermediate results: never flushed, deleted before the step commits."""
        from pipeline.rundir.activation_store import ScratchStreams

        if self._scratch is None:
            try:
                folder = self._storage.new_folder(f"data/{self.id}/{_SCRATCH}", is_bulky=True)
            except FileGone:
                self._check_superseded()
                raise
            self._scratch = ScratchStreams(folder, self._check_superseded)
        return self._scratch

    def seal(self) -> dict[str, Payload]:
        """Complete the payloads and return them by name. Nothing can be written after that.

        Raises MissingChunk for a stream with a sample that was never written; Superseded if the folder is
        gone because another process has committed this step.
        """
        if self._payloads is None:
            if self._scratch is not None:
                self._scratch.close()
            payloads = {name: stream.seal(self._key(name)) for name, stream in self._streams.items()}
            payloads.update((name, folder._seal()) for name, folder in self._folders.items())
            self._require_all_there(payloads)
            self._payloads = dict(sorted(payloads.items()))
        return self._payloads

    def _require_all_there(self, payloads: dict[str, Payload]) -> None:
        expected = {file.path for payload in payloads.values() for file in payload.files}
        there = self._storage.written(f"data/{self.id}")
        if expected - there:
            self._check_superseded()
            raise MissingChunk(f"{self._storage.label}/{min(expected - there)} was deleted before {self.step} was done")
        # A file that bypassed the writer would have no digest in the commit.
        assert not there - expected, f"{min(there - expected)} belongs to no payload of {self.step}"

    def _key(self, name: str) -> str:
        """Key of a payload. Slashes in its name are replaced: they would nest one payload in another."""
        return f"data/{self.id}/{name.replace('/', '-')}"

    def _new_root(self, name: str, *, is_bulky: bool = False) -> Path:
        """The new folder of a payload."""
        relative_path(name)
        if name.startswith(".") or self._payloads is not None:
            raise ValueError(f"payload {name} cannot be made: a bad name, or {self.step} is sealed")
        try:
            return self._storage.new_folder(self._key(name), is_bulky=is_bulky)
        except FileGone:
            self._check_superseded()
            raise

    def _new_folder(self, name: str, kind: str, *, is_bulky: bool = False) -> PayloadFolder:
        try:
            folder = PayloadFolder(
                self._storage, self._key(name), self._new_root(name, is_bulky=is_bulky), kind, self._check_superseded
            )
        except FileExists:
            raise ValueError(f"{self.step} makes payload {name} twice") from None
        self._folders[name] = folder
        return folder


class PayloadFolder:
    """A payload made of files: written through the hashing writer, or linked with a digest that is known."""

    def __init__(self, storage: Storage, key: str, path: Path, kind: str, check_superseded: Callable[[], None]) -> None:
        self.key = key
        self.path = path
        self._storage = storage
        self._check_superseded = check_superseded
        self._kind = kind
        self._files: dict[str, PayloadFile] = {}
        self._sealed: Payload | None = None

    def write(self, filename: str, contents: Contents) -> PayloadFile:
        """The record of the new file `filename`. `contents`: its bytes, or a function that writes them."""
        try:
            with FileWriter(self._target(filename)) as writer:
                if callable(contents):
                    contents(writer)
                else:
                    writer.write(contents)
        except FileGone:
            self._check_superseded()
            raise
        return self._add(filename, writer.digest)

    def link(self, filename: str, source: PayloadFile) -> PayloadFile:
        """The record of `filename`, a second name of a file that this run has committed; it is not reread.

        Where the file system has no hard links it is copied, and then compared with its digest.
        """
        digest = FileDigest(source.size, source.sha256)
        file = self._add_link(filename, self._storage.local(source.path), digest)
        self._storage.same_as(file.path, source.path)
        return file

    def _add_link(self, filename: str, source: Path, digest: FileDigest) -> PayloadFile:
        target = self._target(filename)
        try:
            copied = filesystem.link_or_copy(source, target)
        except FileGone:
            self._check_superseded()
            raise
        if copied not in (None, digest) or target.stat().st_size != digest.size:
            raise DamagedData(f"{source} is damaged: it is not what was committed")
        return self._add(filename, digest)

    def _target(self, filename: str) -> Path:
        if self._sealed is not None or filename in self._files:
            raise ValueError(f"{filename} is in {self.path} already, or the payload is sealed")
        target = self.path / relative_path(filename)
        filesystem.make_folder(target.parent)
        return target

    def _add(self, filename: str, digest: FileDigest) -> PayloadFile:
        self._files[filename] = PayloadFile(path=f"{self.key}/{filename}", size=digest.size, sha256=digest.sha256)
        return self._files[filename]

    def _seal(self, original: Payload | None = None) -> Payload:
        """The payload; of another run's kind and stream, if it was taken over from there."""
        if self._sealed is None:
            files = tuple(file for _, file in sorted(self._files.items()))
            stream = original.stream if original is not None else None
            fields = {"kind": self._kind, "root": self.key, "files": files, "stream": stream}
            self._sealed = Payload.model_validate(fields)
        return self._sealed
