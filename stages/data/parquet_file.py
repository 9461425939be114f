"""A local Parquet file as a data source."""

from __future__ import annotations

from dataclasses import dataclass

from stages.data.row_file import RowFile
from stages.data.table import ParquetRows, Table
from stages.data.text_source import Use


@dataclass(frozen=True, kw_only=True)
class ParquetFile(RowFile):
    """A Parquet file with a column of text or conversations."""

    kind = "parquet"
    title = "Parquet"
    help = "A Parquet file: ?column= names its text or conversations."

    def table(self, use: Use) -> Table:
        return ParquetRows.read(self.file, self.name)
