"""Rows of data files as tables: JSON lines and Parquet, with errors that name the file, the row and the columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.data.compression import read_bytes, read_text
from stages.errors import UsageError


class Table(Protocol):
    """Rows with named columns."""

    @property
    def unit(self) -> str:
        """What messages call a row: "line", "row"."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in their order."""
        ...

    def column(self, name: str) -> Iterator[tuple[int, Any]]:
        """Number of each row, from 1, and its value in a column. Raises UsageError for a row without it."""
        ...


class ReadableTable(Table, Protocol):
    """A table that is read from a file."""

    @classmethod
    def read(cls, path: Path, name: str) -> Table:
        """The rows of a file. name: what messages call it. Raises UsageError if it cannot be read."""
        ...


@dataclass(frozen=True)
class JsonRows:
    """One JSON object a line."""

    name: str  # what messages call the file
    rows: Sequence[tuple[int, dict[str, Any]]]  # number of the line, and its object
    unit: str = "line"

    @classmethod
    def read(cls, path: Path, name: str) -> JsonRows:
        """The objects of a file: one a line, or one list of them.

        Raises:
            UsageError: It cannot be read, or a line is no JSON object.
        """
        text = read_text(path, name)
        if text.lstrip().startswith("["):
            return cls(name, tuple(_list_of_objects(text, name)), "entry")
        # Only a newline ends a line: str.splitlines would cut at much else.
        lines = enumerate(text.split("\n"), 1)
        return cls(name, tuple((number, _object(line, name, number)) for number, line in lines if line.strip()))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(key) for _, row in self.rows for key in row))

    def column(self, name: str) -> Iterator[tuple[int, Any]]:
        for number, row in self.rows:
            if name not in row:
                found = ", ".join(map(str, row)) or "nothing"
                raise UsageError(f"{self.name}, {self.unit} {number}: no text under {name!r} (it has {found})")
            yield number, _unicode(row[name], f"{self.name}, {self.unit} {number}, column {name!r}")


def _unicode(value: Any, place: str) -> Any:
    """The same value. Raises UsageError where a text of it holds half of a character: JSON allows that, Unicode not."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place} holds half of a character ({error.object[error.start]!a}, a lone surrogate): correct or remove it"
        ) from error
    return value


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}, line {number}: no JSON; one object a line is expected ({error})") from error
    if not isinstance(record, dict):
        raise UsageError(f"{name}, line {number}: one JSON object a line is expected, and it is no object")
    return record


def _list_of_objects(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON list, and no JSON object a line ({error})") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UsageError(f"{name}, entry {number}: no JSON object")
        yield number, record


@dataclass(frozen=True)
class ParquetRows:
    """A Parquet file."""

    name: str  # what messages call the file
    data: Any  # pyarrow.Buffer
    columns: tuple[str, ...]
    unit: str = "row"

    @classmethod
    def read(cls, path: Path, name: str) -> ParquetRows:
        """The file, whose columns are read when they are asked for. Raises UsageError if it cannot be read."""
        import pyarrow
        from pyarrow import parquet

        data = read_bytes(path, name)
        try:
            return cls(name, data, tuple(parquet.read_schema(io.BytesIO(data)).names))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UsageError(f"{name} is no Parquet file that can be read ({error})") from error

    def column(self, name: str) -> Iterator[tuple[int, Any]]:
        import pyarrow
        from pyarrow import parquet

        if name not in self.columns:
            raise UsageError(f"{self.name} has no column {name!r} (it has {', '.join(self.columns)})")
        try:
            values = parquet.read_table(io.BytesIO(self.data), columns=[name])[name]
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UsageError(f"{self.name} is no Parquet file that can be read ({error})") from error
        for number, value in enumerate(values, 1):
            try:
                found = value.as_py()
            # Bytes that are no UTF-8, a time that Python has no date for.
            except (ValueError, OverflowError, pyarrow.ArrowException) as error:
                place = f"{self.name}, {self.unit} {number}, column {name!r}"
                raise UsageError(f"{place} holds a value of type {value.type} that cannot be read ({error})") from error
            yield number, found


def described(value: Any) -> str:
    """What a value of a data file is, in the words of JSON."""
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        kind = described(value[0]) if value else ""
        return f"a list that begins with {kind}" if kind else "an empty list"
    return names.get(type(value), "text" if isinstance(value, str) else f"a value of type {type(value).__name__}")
