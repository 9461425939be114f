"""A local file of JSON lines as a data source."""

from __future__ import annotations

from dataclasses import dataclass

from stages.data.row_file import RowFile
from stages.data.table import JsonRows


@dataclass(frozen=True, kw_only=True)
class JsonLinesFile(RowFile):
    """One JSON object a line, or one list of objects."""

    kind = "jsonl"
    title = "JSON lines"
    help = "A file with one JSON object a line: ?column= names its text or conversations; also .gz, .bz2, .xz, .zst."
    rows = JsonRows
