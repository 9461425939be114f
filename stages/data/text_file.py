"""A local text file as a data source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.data.compression import ending, read_text
from stages.data.readers import JSON_ENDINGS
from stages.data.text_source import TextSource, Use, local_file
from stages.errors import UsageError
from stages.formats.file_digest import digest_file

_TITLES = {"parquet": "Parquet", "jsonl": "JSON"}

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


@dataclass(frozen=True)
class TextFile(TextSource):
    """A UTF-8 text file, also compressed. It is one document, the same for calibration and evaluation."""

    kind = "text"
    title = "text file"
    help = "A text file, UTF-8, as it is; also .gz, .bz2, .xz, .zst."
    path = "required"

    file: Path

    @classmethod
    def named(cls, path: str | None) -> TextFile:
        file = local_file(cls.kind, path)
        other = kind_by_ending(file)
        if other != cls.kind:
            raise UsageError(
                f"{cls.kind}:{path}: this is {_TITLES[other]}, and text: takes a file as it is, markup "
                f"and all; write {other}:{path}"
            )
        return cls(f"{cls.kind}:{file}", file)

    @property
    def is_local(self) -> bool:
        return True

    def check(self) -> None:
        self.documents("evaluation")

    def digest(self) -> SourceDigest:
        found = digest_file(self.file)
        return {"size": found.size, "sha256": found.sha256}

    def documents(self, use: Use) -> Sequence[str]:
        return [read_text(self.file, self.name)]


def kind_by_ending(path: Path) -> str:
    """The kind of data source for a file, by its ending: "jsonl", "parquet", else "text"."""
    return {".parquet": "parquet", **dict.fromkeys(JSON_ENDINGS, "jsonl")}.get(ending(path), "text")
