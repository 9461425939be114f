"""Activation streams on disk: one Zarr v3 array each, one chunk per sample.

Zarr alone reads a missing chunk as its fill value, without a word, and does not know which chunks belong
together. So the store under the array keeps every file's size and sha256 as it is written, raises where a
chunk is missing, and checks what it reads against the commit. Besides, each chunk carries a crc32c, which
guards the streams that no commit knows (scratch, and the attempt under way).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import google_crc32c
import numpy
import torch
import zarr
from torch import Tensor
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from pipeline.errors import DamagedData, DiskError, FileGone, MissingChunk
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import FileDigest, FileWriter
from pipeline.rundir.records import Payload, PayloadFile, StreamDtype, StreamSpec
from pipeline.rundir.storage.base import Storage
from stages.errors import NumericalError

_METADATA = "zarr.json"

_DTYPES: dict[StreamDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_CHECKSUM_BYTES = 4  # crc32c

REPAIR = "Nothing was computed with it. `lampctl resume` makes it again"


def _nothing_to_explain() -> None:
    """Do nothing: a scratch stream belongs to one process, so no other one can be ahead."""


def stream_spec(num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> StreamSpec:
    """The description of a stream. Raises ValueError for a dtype that streams cannot hold."""
    if dtype not in _NAMES:
        raise ValueError(f"a stream holds {', '.join(_DTYPES)}, not {dtype}")
    return StreamSpec(num_samples=num_samples, sample_shape=sample_shape, dtype=_NAMES[dtype])


def write_stream(
    folder: Path, spec: StreamSpec, explain_missing: Callable[[], None] = _nothing_to_explain
) -> ActivationStream:
    """An empty stream in the empty folder `folder`. Call `seal` when all samples are written.

    `explain_missing` is called when a file turns out to be gone, and may raise a better error for it.
    """
    store = _ChunkStore(folder, explain_missing)
    fill: float | int = float("nan")
    if spec.dtype == "bfloat16":
        fill = 0xFFFF  # a bf16 NaN
    elif spec.dtype.startswith("int"):
        fill = -1
    zarr.create_array(
        store,
        shape=(spec.num_samples, *spec.sample_shape),
        chunks=(1, *spec.sample_shape),
        dtype="uint16" if spec.dtype == "bfloat16" else spec.dtype,  # zarr 3 has no bfloat16
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=fill,
        # "." keeps all chunks in one folder; "/" would make, and flush, two folders per sample.
        chunk_key_encoding={"name": "default", "separator": "."},
        # Without it, a chunk that equals the fill value is left out, and would look lost.
        config={"write_empty_chunks": True},
        attributes={"logical_dtype": spec.dtype},
    )
    return ActivationStream(store, spec)


def open_stream(
    storage: Storage,
    payload: Payload,
    origin: str = "",
    explain_missing: Callable[[], None] = _nothing_to_explain,
    checked: set[str] | None = None,
) -> ActivationStream:
    """The stream that a commit describes, to read.

    Every file must be there with its size, or MissingChunk or DamagedData is raised now; its sha256 is
    checked when it is first read. `origin` says in messages which payload of which step it is; `checked`
    holds the keys that have been found good, and may be shared between streams of one run.
    """
    spec = payload.stream
    if spec is None:
        raise ValueError(f"{payload.root} is no activation stream")
    files = {payload.inner(file): file for file in payload.files}
    if files.keys() != _keys(spec):
        raise DamagedData(f"the commit of {origin or payload.root} does not list one chunk per sample")
    folder = Path(f"{storage.label}/{payload.root}")  # as messages name it
    _require_chunks_of(spec, files, folder)
    committed = _Committed(storage, payload.root, files, set() if checked is None else checked)
    store = _ChunkStore(folder, explain_missing, committed, origin)
    store.check_sizes()
    with _translating(folder / _METADATA, origin):
        array = zarr.open_array(store, mode="r", zarr_format=3)
    is_ours = (
        array.shape == (spec.num_samples, *spec.sample_shape)
        and array.chunks == (1, *spec.sample_shape)
        and str(array.dtype) == ("uint16" if spec.dtype == "bfloat16" else spec.dtype)
        # Another codec could make a small file a large one.
        and [type(codec).__name__ for codec in getattr(array.metadata, "codecs", ())] == ["BytesCodec", "Crc32cCodec"]
    )
    if not is_ours:
        raise DamagedData(f"{folder / _METADATA} describes another array than its commit. {REPAIR}")
    return ActivationStream(store, spec)


def _require_chunks_of(spec: StreamSpec, files: Mapping[str, PayloadFile], folder: Path) -> None:
    """Raise DamagedData unless each chunk has just the size of a sample: nothing larger is ever made room for."""
    size = math.prod(spec.sample_shape) * _DTYPES[spec.dtype].itemsize + _CHECKSUM_BYTES
    for key, file in files.items():
        if key != _METADATA and file.size != size:
            raise DamagedData(f"the commit says {file.size} bytes of {folder / key}, a sample of it has {size}")


class ActivationStream:
    """A `stages.interfaces.Stream` on disk. A stream under way can be read, too, where it has been written."""

    def __init__(self, store: _ChunkStore, spec: StreamSpec) -> None:
        self._store = store
        self.spec = spec
        self.folder = store.folder
        self.dtype = _DTYPES[spec.dtype]

    def __len__(self) -> int:
        return self.spec.num_samples

    def __getitem__(self, index: int, /) -> Tensor:
        """Sample `index` on the CPU, as it was written, bit for bit, in memory that torch allocated.

        The memory matters: torch aligns to 64 bytes and numpy does not, and the last bits of a matrix product
        depend on alignment. Raises IndexError, MissingChunk, DamagedData.
        """
        self._check_index(index)
        size = math.prod(self.spec.sample_shape) * self.dtype.itemsize
        chunk = torch.empty(size + _CHECKSUM_BYTES, dtype=torch.uint8)
        self._store.read_chunk(_chunk_key(index, self.spec), memoryview(chunk.numpy()))  # type: ignore[arg-type]
        return chunk[:size].view(self.dtype).view(self.spec.sample_shape)

    def write(self, index: int, sample: Tensor, /) -> None:
        """Store sample `index`, converted to the stream's dtype. Not durable before the step commits.

        Raises IndexError; ValueError for another shape; NumericalError where float16 overflows; OutOfDisk.
        """
        self._check_index(index)
        if tuple(sample.shape) != self.spec.sample_shape:
            raise ValueError(f"sample {index} is {tuple(sample.shape)}, the stream holds {self.spec.sample_shape}")
        stored = sample.detach().to("cpu", self.dtype).contiguous()
        # float16 ends at 65,504, and zarr would store the infinity without a word.
        if self.dtype == torch.float16 and not bool(torch.isfinite(stored).all()):
            raise NumericalError(
                f"sample {index} of {self.folder.name} does not fit float16 (largest magnitude "
                f"{sample.detach().abs().max().item():g}): keep activations in bfloat16 or float32"
            )
        data = stored.reshape(-1).view(torch.uint8).numpy()
        self._store.write_chunk(_chunk_key(index, self.spec), memoryview(data))  # type: ignore[arg-type]

    def seal(self, root: str) -> Payload:
        """The payload to commit, whose files have keys under `root`. Nothing can be written after that.

        Raises MissingChunk naming the first sample that was never written.
        """
        written = self._store.digests
        for index in range(len(self)):
            key = _chunk_key(index, self.spec)
            if key not in written:
                raise MissingChunk(f"sample {index} of {self.folder} was never written")
        self._store.seal()
        files = tuple(
            PayloadFile(path=f"{root}/{key}", size=digest.size, sha256=digest.sha256)
            for key, digest in sorted(written.items())
        )
        return Payload(kind="stream", root=root, files=files, stream=self.spec)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a stream of {len(self)}")


class ScratchStreams:
    """A `stages.interfaces.Scratch` in an empty folder of its own: never flushed, gone when closed."""

    def __init__(self, folder: Path, explain_missing: Callable[[], None] = _nothing_to_explain) -> None:
        self.folder = folder
        self._explain_missing = explain_missing
        self._num_made = 0

    def stream(
        self, name: str, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype
    ) -> ActivationStream:
        """A new, empty stream. Names are for people: the same name again gives another stream."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in name)
        folder = self.folder / f"{self._num_made:04d}-{plain}"
        self._num_made += 1
        _make_folder(folder, self._explain_missing)
        return write_stream(folder, stream_spec(num_samples, sample_shape, dtype), self._explain_missing)

    def close(self) -> None:
        """Delete all its streams; closing twice is fine."""
        filesystem.remove_tree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Committed:
    """A stream as a commit describes it: its root, its files by name, and the keys found sound so far."""

    storage: Storage
    root: str
    files: Mapping[str, PayloadFile]
    checked: set[str]


class _ChunkStore(Store):
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
        committed: _Committed | None = None,
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
        if found.size != len(chunk) or _checksum(chunk[:-_CHECKSUM_BYTES]) != chunk[-_CHECKSUM_BYTES:]:
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
        return MissingChunk(f"{path}{_of(self.origin)} is missing. {REPAIR}")

    def _damaged(self, path: Path, reason: str) -> DamagedData:
        return DamagedData(f"{path}{_of(self.origin)} is damaged: {reason}. {REPAIR}")


def _make_folder(folder: Path, explain_missing: Callable[[], None]) -> None:
    try:
        filesystem.make_new_folder(folder)
    except FileGone:
        explain_missing()
        raise


def _checksum(data: memoryview) -> bytes:
    return struct.pack("<I", google_crc32c.value(numpy.frombuffer(data, numpy.uint8)))


def _is(found: FileDigest, file: PayloadFile) -> bool:
    return found == FileDigest(file.size, file.sha256)


def _of(origin: str) -> str:
    return f" ({origin})" if origin else ""


def _chunk_key(index: int, spec: StreamSpec) -> str:
    return ".".join(["c", str(index), *("0" for _ in spec.sample_shape)])


def _keys(spec: StreamSpec) -> set[str]:
    return {_METADATA, *(_chunk_key(index, spec) for index in range(spec.num_samples))}


@contextlib.contextmanager
def _translating(path: Path, origin: str) -> Iterator[None]:
    """DamagedData where zarr cannot make sense of the bytes."""
    try:
        yield
    except (DamagedData, DiskError):
        raise
    except (
        *(ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, OverflowError),
        *(NotImplementedError, RecursionError, ImportError),
    ) as error:
        # crc32c and reshaping failures are both plain ValueErrors in zarr 3.1.
        raise DamagedData(f"{path}{_of(origin)} is damaged: {error}. {REPAIR}") from error
