"""Any data set of the Hugging Face hub as a data source, read by the library `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from stages.data.hub_access import from_cache, read_through_hub, require_reachable, unreachable
from stages.data.query import split_query, with_query
from stages.data.row_text import RowText
from stages.data.table import Table
from stages.data.text_source import Use
from stages.errors import UsageError

_REPO = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OPTIONS = ("config", "split", "column")
# Splits for evaluation, in the order in which they are looked for.
_UNSEEN = ("test", "validation", "train")


@dataclass(frozen=True, kw_only=True)
class HubDataset(RowText):
    """A data set of the hub: ``hf:REPO?config=NAME&split=NAME&column=NAME``.

    Without a split: ``train`` for calibration; the first of ``test``, ``validation``, ``train`` for evaluation.
    """

    kind = "hf"
    title = "data set of the hub"
    help = "A data set of the Hugging Face hub; ?config=, &split= and &column= say which part of it."
    path = "required"
    path_metavar = "REPO"

    repo: str
    config: str | None = None
    split: str | None = None

    @classmethod
    def named(cls, path: str | None) -> Self:
        repo, options = split_query(cls.kind, path or "", _OPTIONS)
        if not _REPO.fullmatch(repo):
            raise UsageError(
                f"hf:{path or ''}: write hf:OWNER/NAME, as on the hub; a file is jsonl:FILE, parquet:FILE or text:FILE"
            )
        return cls(
            with_query(f"hf:{repo}", options),
            options.get("column"),
            repo=repo,
            config=options.get("config"),
            split=options.get("split"),
        )

    @property
    def is_local(self) -> bool:
        return False

    def digest(self) -> None:
        return None

    def check(self) -> None:
        from stages.machine.hub import UNREACHABLE

        try:
            require_reachable(self.repo)
        except UNREACHABLE as error:
            if from_cache(lambda: self._load("calibration")) is None:
                raise unreachable(self.name, error, self._local) from error

    def table(self, use: Use) -> Table:
        def cached() -> Any:
            return from_cache(lambda: self._load(use))

        return _HubRows(self.name, read_through_hub(self.repo, self.name, lambda: self._load(use), cached, self._local))

    @property
    def _local(self) -> str:
        name = self.repo.rpartition("/")[2]
        return f"local data (parquet:{name}.parquet, jsonl:{name}.jsonl, text:{name}.txt)"

    def _load(self, use: Use) -> Any:
        """The rows, a `datasets.Dataset`."""
        import datasets

        try:
            split = self.split or self._usual_split(use)
            return datasets.load_dataset(self.repo, self.config, split=split)
        except (ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
            if datasets.config.HF_HUB_OFFLINE:
                raise
            about = " ".join(str(error).split())
            raise UsageError(f"{self.name}: `datasets` cannot read it ({about[:500]}): {self._remedy}") from error

    def _usual_split(self, use: Use) -> str:
        import datasets

        if use == "calibration":
            return "train"
        found = datasets.get_dataset_split_names(self.repo, self.config)
        return next((split for split in _UNSEEN if split in found), found[0])

    @property
    def _remedy(self) -> str:
        return f"say which part, as in hf:{self.repo}?config=NAME&split=NAME"


class _HubRows:
    """The rows of a `datasets.Dataset` as a `stages.data.table.Table`."""

    unit = "row"

    def __init__(self, name: str, rows: Any) -> None:
        self._name, self._rows = name, rows

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._rows.column_names)

    def column(self, name: str) -> Iterator[tuple[int, Any]]:
        if name not in self.columns:
            raise UsageError(f"{self._name} has no column {name!r} (it has {', '.join(self.columns)})")
        values = enumerate(self._rows[name], 1)
        while True:
            try:
                number, value = next(values)
            except StopIteration:
                return
            except (ValueError, OverflowError) as error:
                raise UsageError(
                    f"{self._name}: column {name!r} holds a value that cannot be read ({error})"
                ) from error
            yield number, value
