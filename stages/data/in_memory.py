"""Texts in memory as a data source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from stages.data.base import DataSource
from stages.data.registry import parse_source
from stages.data.text_source import TextSource, Use
from stages.errors import UsageError

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


@dataclass(frozen=True)
class Texts(TextSource):
    """Documents that a program holds."""

    kind = "texts"
    title = "texts in memory"
    help = "Documents that a program passes to lampctl.prune."

    found: tuple[str, ...] = ()

    @classmethod
    def named(cls, path: str | None) -> Self:
        raise UsageError("texts in memory have no name")

    @property
    def is_local(self) -> bool:
        return True

    def check(self) -> None:
        if not any(self.found):
            raise UsageError("the calibration texts are empty")

    def digest(self) -> SourceDigest:
        text = "\0".join(self.found).encode()
        return {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    def documents(self, use: Use) -> Sequence[str]:
        return self.found


def source_of(text: str | Sequence[str]) -> TextSource:
    """The data source of this name, or of these texts.

    Raises:
        UsageError: There is no such source, it holds images, or the texts are empty.
    """
    source: DataSource = parse_source(text) if isinstance(text, str) else Texts("texts", tuple(text))
    if not isinstance(source, TextSource):
        raise UsageError(f"{source.name} holds {source.contents}, a language model needs text")
    source.check()
    return source
