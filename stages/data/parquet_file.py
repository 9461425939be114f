"""A local Parquet file as a data source."""

from __future__ import annotations

from dataclasses import dataclass

from stages.data.row_file import RowFile
from stages.data.table import ParquetRows


@dataclass(frozen=True, kw_only=True)
class ParquetFile(RowFile):
    """A Parquet file with a column of text or conversations."""

    kind = "parquet"
    title = "Parquet"
    help = "A Parquet file: ?column= names its text or conversations."
    rows = ParquetRows
