"""Base of data sources whose documents are rows of a table: one column of text or conversations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from stages.data.chat import CHAT_COLUMNS, ChatTemplate, Render, contents_alone, messages_of, renderer
from stages.data.table import Table
from stages.data.text_source import TextSource, Use
from stages.errors import UsageError

_TEXT_COLUMN = "text"


@dataclass(frozen=True)
class RowText(TextSource):
    """Rows of a table. A document is the text, or the conversation, in one column of a row."""

    column: str | None = None  # None: found by its name and contents
    render: Render = field(default=contents_alone, compare=False, repr=False)  # a conversation as text

    @abstractmethod
    def table(self, use: Use) -> Table:
        """The rows. Raises UsageError, ResourceError."""

    def for_model(self, tokenizer: Any, chat_template: ChatTemplate) -> Self:
        return replace(self, render=renderer(tokenizer, chat_template))

    def check(self) -> None:
        # A conversation is read, and not rendered: that takes the tokenizer of a model.
        replace(self, render=contents_alone).documents("evaluation")

    def documents(self, use: Use) -> Sequence[str]:
        table = self.table(use)
        name = self.column or self._found_column(table)
        if name not in table.columns:
            raise UsageError(f"{self.name} has no column {name!r}: write ?column= and one of {_listed(table.columns)}")
        documents = list(self._documents(table, name))
        if not any(documents):
            raise UsageError(f"{self.name} has no text in column {name!r} (columns: {_listed(table.columns)})")
        return documents

    def _found_column(self, table: Table) -> str:
        """The column of text or conversations, if only one can be meant."""
        columns = table.columns
        for name in (_TEXT_COLUMN, *CHAT_COLUMNS):
            if name in columns:
                return name
        if not columns:
            raise UsageError(f"{self.name} has no rows")
        textual = [name for name in columns if _is_text(next(table.column(name), (0, None))[1])]
        if len(textual) != 1:
            raise UsageError(
                f"{self.name} has no column 'text', 'messages' or 'conversations': write ?column= and one of "
                f"{_listed(columns)}"
            )
        return textual[0]

    def _documents(self, table: Table, column: str) -> Iterator[str]:
        for number, value in table.column(column):
            if isinstance(value, str):
                yield value
                continue
            messages = messages_of(value)
            if messages is None:
                raise UsageError(
                    f"{self.name}, {table.unit} {number}: column {column!r} holds {_described(value)}, not text and no "
                    f"conversation: write ?column= and one of {_listed(table.columns)}"
                )
            try:
                yield self.render(messages)
            except UsageError as error:
                raise UsageError(f"{self.name}, {table.unit} {number}, column {column!r}: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or messages_of(value) is not None


def _described(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns)
