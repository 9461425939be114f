"""Codes of 2 to 8 bits without gaps: code after code, the highest bit of each first, as masks are packed too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Eight codes end at a byte's end, whatever their width: pieces of a multiple of eight codes share no byte.
_PIECE = 1 << 20


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(N,) uint8 codes below 2^bits as ceil(N bits / 8) bytes, uint8; the bits left over are 0.

    Raises ValueError for a code that needs more than `bits` bits.
    """
    _check_width(bits)
    flat = codes.numpy()
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"code {int(flat.max())} does not fit into {bits} bits")
    packed = np.empty(packed_length(flat.size, bits), dtype=np.uint8)
    for start in range(0, flat.size, _PIECE):
        digits = np.unpackbits(flat[start : start + _PIECE, None], axis=1)[:, 8 - bits :]
        piece = np.packbits(digits)
        first = start // 8 * bits
        packed[first : first + piece.size] = piece
    return torch.from_numpy(packed)


def unpack_codes(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The (num_codes,) uint8 codes that `pack_codes` packed. Raises ValueError if there are more or fewer bytes."""
    _check_width(bits)
    flat = packed.numpy()
    if flat.size != packed_length(num_codes, bits):
        raise ValueError(f"{flat.size} bytes do not hold {num_codes} codes of {bits} bits")
    codes = np.empty(num_codes, dtype=np.uint8)
    for start in range(0, num_codes, _PIECE):
        stop = min(start + _PIECE, num_codes)
        first = start // 8 * bits
        piece = flat[first : first + packed_length(stop - start, bits)]
        digits = np.zeros((stop - start, 8), dtype=np.uint8)
        digits[:, 8 - bits :] = np.unpackbits(piece, count=(stop - start) * bits).reshape(-1, bits)
        codes[start:stop] = np.packbits(digits, axis=1)[:, 0]
    return torch.from_numpy(codes)


def packed_length(num_codes: int, bits: int) -> int:
    """How many bytes `pack_codes` makes of this many codes."""
    return (num_codes * bits + 7) // 8


def _check_width(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
