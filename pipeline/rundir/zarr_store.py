"""What zarr reads and writes one activation stream through: files with digests, none of which may be missing.

Zarr alone reads a missing chunk as its fill value, without a word, and does not know which chunks belong together. So
this store keeps every file's size and sha256 as it is written, raises where a chunk is missing, and checks what it
reads against the commit. Besides, each chunk carries a crc32c, which guards the streams that no commit knows (scratch,
and the attempt under way).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from pipeline.errors import DamagedData, FileGone, MissingChunk
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import FileDigest, FileWriter
from pipeline.rundir.records import PayloadFile
from pipeline.rundir.storage.base import Storage

CHECKSUM_BYTES = 4  # crc32c, behind each chunk
REPAIR = "Nothing was computed with it. `lampctl resume` makes it again"


@dataclass(frozen=True)
class Committed:
    """A stream as a commit describes it: its root, its files by name, and the keys found sound so far."""

    storage: Storage
    root: str
    files: Mapping[str, PayloadFile]
    checked: set[str]


class ChunkStore(Store):
    """What zarr reads and writes one array through: a folder, and the digest of every file in it.

    Not a subclass of zarr's LocalStore, whose shortcuts (`get_sync`, `set_sync`) would bypass the checks. Chunks are
    written and read here, without zarr's pipeline of codecs and threads, which costs up to a millisecond and two
    copies a chunk; the bytes are zarr's (tests/pipeline/rundir/test_activation_store.py), whose arrays these are.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        folder: Path,
        explain_missing: Callable[[], None],
        committed: Committed | None = None,
        origin: str = "",
    ) -> None:
        super().__init__(read_only=committed is not None)
        self.folder = folder
        self.origin = origin
        self.digests: dict[str, FileDigest] = {}
        self._explain_missing = explain_missing
        self._committed = committed

    def seal(self) -> None:
        """Refuse all writes from now on."""
        self._read_only = True

    def check_sizes(self) -> None:
        """Raise MissingChunk or DamagedData unless every committed file is there with its size."""
        assert self._committed is not None
        sizes = self._committed.storage.sizes(self._committed.root)
        for key, file in self._committed.files.items():
            path, size = self.folder / key, sizes.get(file.path)
            if size is None:
                raise self._missing(path)
            if size != file.size:
                raise self._damaged(path, f"it has {size} bytes, {file.size} were committed")

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The file's bytes, checked; None only for metadata that zarr looks for and that is not ours."""
        assert byte_range is None, "chunks are read whole: there is no sharding"
        # zarr asks what a new folder holds, by names of other formats too; anything else is a chunk.
        known = self._committed.files if self._committed is not None else self.digests
        if key not in known and not key.startswith("c."):
            return None
        data = await asyncio.to_thread(self._read, key)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file, whole, and remember its digest."""
        self._check_writable()
        self.digests[key] = await asyncio.to_thread(self._write, key, memoryview(value.as_buffer_like()))

    async def exists(self, key: str) -> bool:
        return key in (self._committed.files if self._committed is not None else self.digests)

    async def delete(self, key: str) -> None:
        raise NotImplementedError(f"{self.folder}: a stream never deletes a file")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def list(self) -> AsyncIterator[str]:
        for key in sorted(self._committed.files if self._committed is not None else self.digests):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        if not prefix:
            async for key in self.list():
                yield key

    def with_read_only(self, read_only: bool = False) -> Store:
        if read_only != self.read_only:
            raise ValueError("a stream is opened either to write or to read")
        return self

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Store.__hash__

    def write_chunk(self, key: str, data: memoryview) -> None:
        """Write a chunk with its crc32c behind it, as zarr's codec puts it, and remember the digest."""
        self._check_writable()
        path = self.folder / key
        if key in self.digests:
            filesystem.remove_file(path)
        try:
            with FileWriter(path) as writer:
                writer.write(data)
                writer.write(_checksum(data))
        except FileGone:
            self._explain_missing()
            raise
        self.digests[key] = writer.digest

    def read_chunk(self, key: str, chunk: memoryview) -> None:
        """Fill `chunk` with the file's bytes, checked: size and crc32c always, sha256 when it is first read."""
        path, committed = self.folder / key, self._committed
        try:
            if committed is None:
                found = filesystem.read_into(path, chunk, with_digest=False)
            else:
                file = committed.files[key]
                is_new = file.path not in committed.checked
                found = filesystem.read_into(committed.storage.local(file.path), chunk, with_digest=is_new)
                if is_new and not _is(found, file) and committed.storage.drop_copy(file.path):
                    found = filesystem.read_into(committed.storage.local(file.path), chunk, with_digest=True)
                if is_new and not _is(found, file):
                    raise self._damaged(path, "its sha256 is not the committed one")
                committed.checked.add(file.path)
        except FileGone:
            raise self._missing(path) from None
        if found.size != len(chunk) or _checksum(chunk[:-CHECKSUM_BYTES]) != chunk[-CHECKSUM_BYTES:]:
            raise self._damaged(path, "its checksum is not that of its contents")

    def _read(self, key: str) -> bytes:
        path, committed = self.folder / key, self._committed
        try:
            if committed is None:
                return filesystem.read_file(path)
            file = committed.files[key]
            data = committed.storage.load(file.path)
        except FileGone:
            raise self._missing(path) from None
        if file.path not in committed.checked:
            if not _is(filesystem.hash_bytes(data), file) and committed.storage.drop_copy(file.path):
                data = committed.storage.load(file.path)
            if not _is(filesystem.hash_bytes(data), file):
                raise self._damaged(path, "its sha256 is not the committed one")
            committed.checked.add(file.path)
        return data

    def _write(self, key: str, data: memoryview) -> FileDigest:
        path = self.folder / key
        if key in self.digests:
            filesystem.remove_file(path)
        try:
            return filesystem.write_file(path, data)
        except FileGone:
            self._explain_missing()
            raise

    def _missing(self, path: Path) -> MissingChunk:
        self._explain_missing()
        if self._committed is None:
            return MissingChunk(f"{path} was never written")
        return MissingChunk(f"{path}{named_origin(self.origin)} is missing. {REPAIR}")

    def _damaged(self, path: Path, reason: str) -> DamagedData:
        return DamagedData(f"{path}{named_origin(self.origin)} is damaged: {reason}. {REPAIR}")


def named_origin(origin: str) -> str:
    """Which payload of which step a file is of, in brackets, for messages."""
    return f" ({origin})" if origin else ""


def _checksum(data: memoryview) -> bytes:
    return struct.pack("<I", google_crc32c.value(numpy.frombuffer(data, numpy.uint8)))


def _is(found: FileDigest, file: PayloadFile) -> bool:
    return found == FileDigest(file.size, file.sha256)
