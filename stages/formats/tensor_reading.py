"""Tensors of safetensors files, read into memory that torch allocated."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.formats.disk_errors import reading
from stages.formats.safetensors_io import Entry, TensorFile, read_at

DTYPES = {  # in the order in which the library lays them into a file
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE_BYTES = 1 << 20
# Those of weights. Another one holds codes, of no use without their scales.
PLAIN_DTYPES = frozenset(
    DTYPES[name] for name in ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")
)


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Raises:
        ValueError: It is no safetensors file.
        DamagedFileError: It is truncated.
        StorageUnavailableError: The disk does not answer.
    """
    with reading(path), TensorFile(path) as file:
        return file.entries


def load_tensor(path: Path, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a file, in memory of its own.

    Memory that torch allocated, not a view of the file: the last bits of a matrix product depend on how its operands
    are aligned.

    Args:
        path: The file.
        entry: The tensor's place there.
        dtype: What it is converted to; None: it is not.

    Raises:
        ValueError: The file's header is damaged: bytes, shape and dtype of the tensor do not go together.
        DamagedFileError: The file is truncated.
        StorageUnavailableError: The disk does not answer.
    """
    if entry.dtype not in DTYPES or not entry.is_whole:
        raise ValueError(f"{path} has a damaged header: {entry.size_bytes:,} bytes for {entry.dtype} {entry.shape}")
    stored = DTYPES[entry.dtype]
    tensor = torch.empty(entry.shape, dtype=dtype or stored)
    if tensor.nbytes:
        with reading(path), path.open("rb", buffering=0) as file:
            if tensor.dtype == stored:
                read_at(file.fileno(), entry.start, _memory(tensor))
            else:
                _read_converted(file.fileno(), entry, stored, tensor.reshape(-1))
    return tensor


def _read_converted(descriptor: int, entry: Entry, stored: torch.dtype, target: Tensor) -> None:
    """Fill `target` (E,) piece by piece, through a buffer that stays in the processor's cache."""
    piece = _PIECE_BYTES // stored.itemsize
    buffer = torch.empty(min(piece, target.numel()), dtype=stored)
    for start in range(0, target.numel(), piece):
        part = target[start : start + piece]
        read_at(descriptor, entry.start + start * stored.itemsize, _memory(buffer[: part.numel()]))
        part.copy_(buffer[: part.numel()])


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to write to."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
