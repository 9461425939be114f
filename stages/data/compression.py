"""Files as bytes, unpacked by their ending, and what a file is that is not what its ending says."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from stages.errors import UsageError


def _unzstd(data: bytes) -> bytes:
    # Python has this from 3.14 on.
    import pyarrow

    with pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd") as stream:
        unpacked: bytes = stream.read()
        return unpacked


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unzstd,
}
COMPRESSED = tuple(_UNPACK)

# The first bytes of files: what they are, and how to name them.
_SIGNATURES = (
    (b"\x1f\x8b", "it is compressed by gzip; give it the ending .gz"),
    (b"BZh", "it is compressed by bzip2; give it the ending .bz2"),
    (b"\xfd7zXZ", "it is compressed by xz; give it the ending .xz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd; give it the ending .zst"),
    (b"PAR1", "it is Parquet; write parquet:FILE"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
    (b"%PDF", "it is a PDF; extract its text"),
    (b"\xff\xfe", "it is UTF-16; convert it, as iconv -f utf-16 -t utf-8 does"),
    (b"\xfe\xff", "it is UTF-16; convert it, as iconv -f utf-16 -t utf-8 does"),
)


def ending(path: Path) -> str:
    """The last ending of a file's name in lower case, apart from that of its compression: ".jsonl" of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_bytes(path: Path, name: str) -> bytes:
    """A whole file, unpacked if its name ends in .gz, .bz2, .xz or .zst.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        UsageError: It cannot be read.
    """
    import pyarrow

    try:
        data = path.read_bytes()
        unpack = _UNPACK.get(path.suffix.lower())
        return unpack(data) if unpack is not None else data
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, pyarrow.ArrowException) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: Path, name: str) -> str:
    """A whole text file, unpacked, without a byte order mark. Every other character stays as it is.

    Raises:
        UsageError: It cannot be read, or is no UTF-8; the message says what it seems to be.
    """
    data = read_bytes(path, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        about = next((about for start, about in _SIGNATURES if data.startswith(start)), None)
        about = about or "convert it; compressed files end in .gz, .bz2, .xz or .zst"
        raise UsageError(f"{name} is no UTF-8 text (byte {error.start}): {about}") from error
