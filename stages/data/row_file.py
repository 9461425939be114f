"""Base of local files with rows: their path, their options, their digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from stages.data.query import split_query, with_query
from stages.data.row_text import RowText
from stages.data.table import ReadableTable, Table
from stages.data.text_source import Use, local_file
from stages.formats.file_digest import digest_file, local_path

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


@dataclass(frozen=True, kw_only=True)
class RowFile(RowText):
    """A local file with rows, the same for calibration and evaluation."""

    path = "required"
    path_metavar = "FILE"

    rows: ClassVar[type[ReadableTable]]  # how a file of this kind is read

    file: Path

    @classmethod
    def named(cls, path: str | None) -> Self:
        options: dict[str, str] = {}
        if path and not local_path(path).is_file():  # a name may hold a question mark
            path, options = split_query(cls.kind, path, ("column",), lambda start: local_path(start).is_file())
        file = local_file(cls.kind, path)
        column = options.get("column")
        return cls(with_query(f"{cls.kind}:{file}", {"column": column}), column, file=file)

    def table(self, use: Use) -> Table:
        return self.rows.read(self.file, self.name)

    @property
    def is_local(self) -> bool:
        return True

    def digest(self) -> SourceDigest:
        found = digest_file(self.file)
        return {"size": found.size, "sha256": found.sha256}
