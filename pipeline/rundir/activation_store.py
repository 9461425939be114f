"""Activation streams on disk: one Zarr v3 array each, one chunk per sample (`zarr_store` guards its files)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from pipeline.errors import DamagedData, DiskError, FileGone, MissingChunk
from pipeline.rundir import filesystem
from pipeline.rundir.records import Payload, PayloadFile, StreamDtype, StreamSpec
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.zarr_store import CHECKSUM_BYTES, REPAIR, ChunkStore, Committed, named_origin
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
    store = ChunkStore(folder, explain_missing)
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
    committed = Committed(storage, payload.root, files, set() if checked is None else checked)
    store = ChunkStore(folder, explain_missing, committed, origin)
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
    size = math.prod(spec.sample_shape) * _DTYPES[spec.dtype].itemsize + CHECKSUM_BYTES
    for key, file in files.items():
        if key != _METADATA and file.size != size:
            raise DamagedData(f"the commit says {file.size} bytes of {folder / key}, a sample of it has {size}")


class ActivationStream:
    """A `stages.interfaces.Stream` on disk. A stream under way can be read, too, where it has been written."""

    def __init__(self, store: ChunkStore, spec: StreamSpec) -> None:
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
        chunk = torch.empty(size + CHECKSUM_BYTES, dtype=torch.uint8)
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


def _make_folder(folder: Path, explain_missing: Callable[[], None]) -> None:
    try:
        filesystem.make_new_folder(folder)
    except FileGone:
        explain_missing()
        raise


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
        raise DamagedData(f"{path}{named_origin(origin)} is damaged: {error}. {REPAIR}") from error
