"""Data sets of text on the Hugging Face hub, or a local copy of one with the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from stages.data.hub_access import from_cache, read_through_hub, require_reachable, unreachable
from stages.data.readers import read_rows
from stages.data.text_source import TextSource, Use, local_file
from stages.formats.file_digest import digest_file

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


@dataclass(frozen=True)
class HubText(TextSource):
    """A data set of the hub. A subclass says which rows it has and how they make one text.

    A local copy (``wikitext2:PATH``) gives the rows that the hub serves, joined in the same way.
    """

    path = "optional"
    repo: ClassVar[str]
    column: ClassVar[str]  # holds the text
    config: ClassVar[str | None] = None
    split: ClassVar[Mapping[Use, str]] = {"calibration": "train", "evaluation": "train"}
    # Files of the hub, where the data set's own configuration is not used.
    files: ClassVar[Mapping[Use, str] | None] = None

    file: Path | None = None  # the local copy

    @classmethod
    def named(cls, path: str | None) -> Self:
        if path is None:
            return cls(cls.kind)
        file = local_file(cls.kind, path)
        return cls(f"{cls.kind}:{file}", file)

    @classmethod
    def from_line(cls, line: str) -> str:
        """The hub's row for one line of the plain text that the data set is made from."""
        return line

    @property
    def is_local(self) -> bool:
        return self.file is not None

    def check(self) -> None:
        if self.file is not None:
            self.documents("evaluation")
            return
        from stages.machine.hub import UNREACHABLE

        try:
            require_reachable(self.repo)
        except UNREACHABLE as error:
            if all(self.cached_rows(use) is None for use in self.split):
                raise unreachable(self.name, error, self._local) from error

    def digest(self) -> SourceDigest | None:
        if self.file is None:
            return None
        found = digest_file(self.file)
        return {"size": found.size, "sha256": found.sha256}

    def documents(self, use: Use) -> Sequence[str]:
        if self.file is None:
            return self.hub_rows(use)
        return read_rows(self.file, self.name, self.column, self.from_line)

    def hub_rows(self, use: Use) -> Sequence[str]:
        """The rows from the hub, or from the local cache if the hub cannot be reached."""
        return read_through_hub(
            self.repo, self.name, lambda: self._load(use), lambda: self.cached_rows(use), self._local
        )

    def cached_rows(self, use: Use) -> Sequence[str] | None:
        """The rows from the cache of `datasets`; None if they are not there."""
        return from_cache(lambda: self._load(use))

    @property
    def _local(self) -> str:
        return f"a local copy ({self.name}:PATH) or text (text:PATH)"

    def _load(self, use: Use) -> Sequence[str]:
        import datasets

        if self.files is None:
            rows: Any = datasets.load_dataset(self.repo, self.config, split=self.split[use])
        else:
            kind = "parquet" if self.files[use].endswith("parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=self.files[use], split=self.split[use])
        column: Sequence[str] = rows[self.column]
        return column
