"""Python's own documentation as a data source: no download, the same on every machine with one Python version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.data.text_source import TextSource, Use

if TYPE_CHECKING:
    from stages.data.base import SourceDigest

# Share of the text that is for evaluation, in whole topics.
_EVALUATION_SHARE = 0.15


@dataclass(frozen=True)
class PythonDocs(TextSource):
    """The topics of the language reference that every Python installation carries, about 460 kB in all."""

    kind = "pydocs"
    title = "Python documentation"
    help = "Python's own documentation, about 460 kB; needs no download."

    @classmethod
    def named(cls, path: str | None) -> PythonDocs:
        return cls(cls.kind)

    @property
    def is_local(self) -> bool:
        return True

    def check(self) -> None:
        return

    def digest(self) -> SourceDigest:
        text = "\0".join(_topics()).encode()
        return {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    def documents(self, use: Use) -> Sequence[str]:
        """The topics for one use. In order, each goes to evaluation unless that makes its share too large."""
        parts: dict[Use, list[str]] = {"calibration": [], "evaluation": []}
        num_seen = num_evaluated = 0
        for topic in _topics():
            num_seen += len(topic)
            evaluates = num_evaluated + len(topic) <= _EVALUATION_SHARE * num_seen
            num_evaluated += len(topic) if evaluates else 0
            parts["evaluation" if evaluates else "calibration"].append(topic)
        return parts[use]


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
