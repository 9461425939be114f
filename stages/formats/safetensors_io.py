"""safetensors files as bytes: read tensor by tensor whatever the dtypes are, written tensor by tensor.

The library builds a whole file in memory, and knows dtypes. Here a tensor is a name and bytes, so that a file can be
taken apart and put together again to the last byte, and one of any size is written in little memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from stages.formats.disk_errors import TruncatedError

Bytes = bytes | bytearray | memoryview

_PIECE_BYTES = 1 << 22
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_BITS = {  # of one number
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file."""

    dtype: str  # the format's own name: "BF16"
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file
    stop: int

    @property
    def size_bytes(self) -> int:
        """How many bytes the tensor has."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether shape and dtype make up the bytes. Of a dtype that is not known, only the signs are checked."""
        if self.size_bytes < 0 or any(size < 0 for size in self.shape):
            return False
        return self.dtype not in _BITS or math.prod(self.shape) * _BITS[self.dtype] == 8 * self.size_bytes


def read_at(descriptor: int, start: int, target: Bytes) -> None:
    """Fill `target` with a file's bytes from `start` on.

    Never through a mapping: where a mapped file is truncated, or its network disk goes away, the kernel ends the
    process by SIGBUS, which Python cannot catch; a read gives an error.

    Args:
        descriptor: An open file. Its position is neither used nor changed, so threads may share it.
        start: In bytes from the start of the file.
        target: Writable memory.

    Raises:
        TruncatedError: The file ends too early.
        OSError: The disk does not give the bytes.
    """
    rest = memoryview(target)
    while len(rest):
        num_read = os.preadv(descriptor, [rest[:_READ_BYTES]], start)
        if num_read == 0:
            raise TruncatedError(f"it ends at byte {start:,}, its header promises {start + len(rest):,} or more")
        rest, start = rest[num_read:], start + num_read


class TensorFile:
    """An open safetensors file, to read. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, saying why, for a file that is not safetensors from its first byte to its last."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.head = self._read_head()
            self.metadata, self.entries = parse_head(self.head)
            end = max((entry.stop for entry in self.entries.values()), default=len(self.head))
            if end != self._size:
                kind = TruncatedError if end > self._size else ValueError
                raise kind(f"{path} has {self._size:,} bytes, its header speaks of {end:,}")
        except (ValueError, OSError):
            self._file.close()
            raise

    def _read_head(self) -> bytes:
        length = bytearray(min(8, self._size))
        read_at(self._file.fileno(), 0, length)
        if len(length) < 8 or (num_bytes := struct.unpack("<Q", length)[0]) > _MAX_HEADER_BYTES:
            raise ValueError(f"{self.path} does not begin as a safetensors file does")
        if num_bytes > self._size - 8:
            raise TruncatedError(f"{self.path} has {self._size:,} bytes, fewer than its header of {num_bytes:,}")
        header = bytearray(num_bytes)
        read_at(self._file.fileno(), 8, header)
        return bytes(length + header)

    def read(self, name: str) -> bytearray:
        """A tensor's bytes. Raises KeyError, TruncatedError, OSError."""
        entry = self.entries[name]
        data = bytearray(entry.size_bytes)
        read_at(self._file.fileno(), entry.start, data)
        return data

    def pieces(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, some megabytes at a time. Raises KeyError, TruncatedError, OSError."""
        entry = self.entries[name]
        for start in range(entry.start, entry.stop, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, entry.stop - start))
            read_at(self._file.fileno(), start, piece)
            yield bytes(piece)

    def close(self) -> None:
        """Close it; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_head(head: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata, and the tensors in the order of their bytes, of a file that begins with `head`.

    head: the 8 bytes of its length and the header itself. Raises ValueError if it is damaged.
    """
    try:
        described: dict[str, Any] = json.loads(head[8:])
        metadata: dict[str, str] = described.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no mapping of texts")
        found = [(*about["data_offsets"], name, about) for name, about in described.items()]
        found.sort(key=lambda item: item[:3])
        entries, end = {}, 0
        for start, stop, name, about in found:
            if not isinstance(about["dtype"], str) or not all(type(n) is int for n in (start, stop, *about["shape"])):
                raise ValueError(f"{name} has no dtype, shape and offsets")
            if start != end:
                raise ValueError(f"a gap before {name}" if start > end else f"{name} overlaps another tensor")
            entries[name] = entry = Entry(about["dtype"], tuple(about["shape"]), len(head) + start, len(head) + stop)
            if not entry.is_whole:
                raise ValueError(
                    f"{name} has {entry.size_bytes:,} bytes, which is no {entry.dtype} {list(entry.shape)}"
                )
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged header: {error}") from error
    return metadata, entries


def header_of(described: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The JSON header of a file, not padded.

    Args:
        described: For each tensor "dtype", "shape" and "data_offsets".
        metadata: Of the file as a whole.
    """
    return _json({"__metadata__": dict(metadata), **described} if metadata else described)


def head_of(header: bytes) -> bytes:
    """How a file begins: the length of the header (8 bytes) and the header, padded to a multiple of 8 bytes."""
    padded = header.ljust((len(header) + 7) // 8 * 8)
    return struct.pack("<Q", len(padded)) + padded


class Sink(Protocol):
    """Where bytes go: what a binary file of Python, or the pipeline's own, can do."""

    def write(self, data: Bytes, /) -> int:
        """Write all of it."""
        ...

    def seek(self, offset: int, /) -> Any:
        """Go on at this byte."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def open_new(path: Path) -> Sink:
    """A new file. Raises FileExistsError."""
    return path.open("xb")


class TensorWriter:
    """A safetensors file that is written tensor after tensor; its header, for which room is left, comes last."""

    def __init__(self, sink: Sink, tensors: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        """tensors: for names and shapes like these (or a few characters longer), or fewer, room is left."""
        self._sink, self._metadata = sink, dict(metadata)
        self._described: dict[str, Any] = {}
        self._end = 0
        room = len(_json({"__metadata__": self._metadata})) + sum(
            len(_json(name)) + len(_json(shape)) + _ENTRY_ROOM for name, shape in tensors
        )
        self._room = (room + 7) // 8 * 8
        sink.write(bytes(8 + self._room))

    def add(self, name: str, dtype: str, shape: Iterable[int], pieces: Iterable[Bytes]) -> int:
        """Write a tensor; how many bytes it has. Raises ValueError for a name that is taken."""
        if name in self._described:
            raise ValueError(f"two tensors would be called {name}")
        start = self._end
        for piece in pieces:
            self._end += self._sink.write(piece)
        self._described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._end]}
        return self._end - start

    def finish(self) -> int:
        """Write the header; the file's size in bytes."""
        header = header_of(self._described, self._metadata)
        assert len(header) <= self._room, f"room for {self._room} bytes of header, {len(header)} are needed"
        self._sink.seek(0)
        self._sink.write(head_of(header.ljust(self._room)))
        return 8 + self._room + self._end


# What the entry of a tensor takes beside its name and shape, with two offsets of 14 digits, and a longer name.
_ENTRY_ROOM = len(',:{"dtype":"F8_E4M3","shape":,"data_offsets":[,]}') + 2 * 14 + 20


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
