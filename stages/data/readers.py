"""The rows of a local copy of a data set: plain text, JSON lines or Parquet, each row as the hub would serve it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

from stages.errors import UsageError

_JSON = (".jsonl", ".ndjson", ".json")


def read_text(path: Path, name: str) -> str:
    """A whole text file, ``.gz`` unpacked, every character as it is. name: what messages call it.

    Raises UsageError if it cannot be read or is no UTF-8.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is no UTF-8 text (byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_rows(path: Path, name: str, column: str, from_line: Callable[[str], str]) -> list[str]:
    """The rows of a local copy, by the file's name: Parquet, JSON lines, else text with one row a line.

    column: which one holds the text in Parquet and JSON lines, whose rows are taken as they are. from_line: the row
    that the hub makes of a line of text. name: what messages call the file. Raises UsageError, saying what is wrong
    and in which row.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        rows = _from_parquet(path, name, column)
    elif kind in _JSON:
        rows = _from_json_lines(read_text(path, name), name, column)
    else:
        rows = [from_line(line.removesuffix("\r")) for line in _lines(read_text(path, name))]
    if not any(rows):
        raise UsageError(f"{name} has no text: a text file has one row a line, the others a column {column!r}")
    return rows


def _lines(text: str) -> list[str]:
    """The lines without their ends. Only a newline ends one: str.splitlines would cut at much else."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _from_json_lines(text: str, name: str, column: str) -> list[str]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{name}, line {number}: no JSON; one object a line is expected ({error})") from error
        value = record.get(column) if isinstance(record, dict) else None
        if not isinstance(value, str):
            found = f"it has {', '.join(map(str, record))}" if isinstance(record, dict) else "it is no object"
            raise UsageError(f"{name}, line {number}: no text under {column!r} ({found})")
        rows.append(value)
    return rows


def _from_parquet(path: Path, name: str, column: str) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise UsageError(f"{name} has no column {column!r} (it has {', '.join(names)})")
        rows = parquet.read_table(path, columns=[column])[column].to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{name} is no Parquet file that can be read ({error})") from error
    if not all(isinstance(row, str) for row in rows):
        raise UsageError(f"{name}: column {column!r} holds something else than text")
    return rows
