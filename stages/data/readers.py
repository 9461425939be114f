"""The rows of a local copy of a data set: plain text, JSON lines or Parquet, each row as the hub would serve it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.data.compression import ending, read_text
from stages.data.table import JsonRows, ParquetRows, Table, described
from stages.errors import UsageError

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


def read_rows(path: Path, name: str, column: str, from_line: Callable[[str], str]) -> list[str]:
    """The rows of a local copy, by the file's name: Parquet, JSON lines, else text with one row a line.

    Args:
        path: The file.
        name: What messages call it.
        column: Which one holds the text in Parquet and JSON lines, whose rows are taken as they are.
        from_line: The row that the hub makes of a line of text.

    Raises:
        UsageError: It cannot be read; the message says what is wrong, and in which row.
    """
    if ending(path) == ".parquet":
        rows = _texts(ParquetRows.read(path, name), name, column)
    elif ending(path) in JSON_ENDINGS:
        rows = _texts(JsonRows.read(path, name), name, column)
    else:
        rows = [from_line(line.removesuffix("\r")) for line in _lines(read_text(path, name))]
    if not any(rows):
        raise UsageError(f"{name} has no text: a text file has one row a line, the others a column {column!r}")
    return rows


def _lines(text: str) -> list[str]:
    """The lines without their ends. Only a newline ends one: str.splitlines would cut at much else."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _texts(table: Table, name: str, column: str) -> list[str]:
    rows = []
    for number, value in table.column(column):
        if not isinstance(value, str):
            raise UsageError(f"{name}, {table.unit} {number}: column {column!r} holds {described(value)}, not text")
        rows.append(value)
    return rows
