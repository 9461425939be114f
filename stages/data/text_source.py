"""Text as a data source: documents, and how they make one text."""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from stages.data.base import DataSource
from stages.errors import UsageError
from stages.formats.file_digest import local_path, real_path

if TYPE_CHECKING:
    from stages.data.chat import ChatTemplate

Use = Literal["calibration", "evaluation"]
# Where BOS stands: at the head of the whole text, of each window, nowhere (`stages.data.bos`).
Bos = Literal["stream", "window", "none"]


@dataclass(frozen=True)
class TextSource(DataSource):
    """Documents of text. A subclass says where they come from.

    Where a source is no local file, its text for calibration and its text for evaluation differ.
    """

    contents = "text"
    # What stands between two documents when they are joined.
    joint: ClassVar[str] = "\n\n"
    # Whether it consists of unrelated documents (web pages): samples are then drawn from single documents.
    has_documents: ClassVar[bool] = False
    # As SparseGPT and its followers evaluate: the number of documents, and of windows of them. None: all.
    max_documents: ClassVar[int | None] = None
    max_windows: ClassVar[int | None] = None

    name: str

    @abstractmethod
    def documents(self, use: Use) -> Sequence[str]:
        """The documents, in their own order. Raises ResourceError if the hub cannot be reached."""

    def for_model(self, tokenizer: Any, chat_template: ChatTemplate) -> Self:
        """This source, with conversations as the model's chat template writes them. Plain text is the same for all."""
        return self

    def skipped(self, use: Use) -> Mapping[str, int]:
        """How many rows `documents` leaves out, by reason."""
        return {}

    def text(self, use: Use, num_documents: int | None = None) -> str:
        """The documents as one text, joined as SparseGPT's code joins them.

        Args:
            use: What the text is for.
            num_documents: Take only the first ones; None: all, or for evaluation `max_documents`.
        """
        if num_documents is None and use == "evaluation":
            num_documents = self.max_documents
        return self.joint.join(self.documents(use)[:num_documents])


def local_file(kind: str, path: str | None) -> Path:
    """The file that follows ``KIND:``, with an absolute path.

    Raises:
        UsageError: There is no such file, or it is a folder or a pattern.
    """
    found = real_path(path or "")
    if path and found.is_file():
        return found
    if path and found.is_dir():
        raise UsageError(f"{kind}:{path} is a folder, and one file is read: name a file in it")
    matches = glob.glob(str(local_path(path))) if path else []
    if matches:
        raise UsageError(
            f"{kind}:{path} is a pattern, and one file is read: name one of the {len(matches)} that it finds"
        )
    raise UsageError(f"{kind}:{path or ''}: no such {'text' if kind == 'text' else 'local'} file")
