"""Base of data sources whose documents are rows of a table: one column of text or conversations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from stages.data.chat import (
    CHAT_COLUMNS,
    ChatTemplate,
    Render,
    contents_alone,
    is_conversation,
    messages_of,
    renderer,
)
from stages.data.table import Table, described
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
        name = self._column_of(table)
        documents = list(self._documents(table, name))
        if not any(documents):
            raise UsageError(f"{self.name} has no text in column {name!r}{_advice(table, name)}")
        return documents

    def skipped(self, use: Use) -> Mapping[str, int]:
        table = self.table(use)
        count = sum(_is_empty(value) for _, value in table.column(self._column_of(table)))
        return {"conversations without messages": count} if count else {}

    def _column_of(self, table: Table) -> str:
        """The column that is named, or found."""
        if self.column is None:
            return self._found_column(table)
        if self.column not in table.columns:
            raise UsageError(f"{self.name} has no column {self.column!r}{_advice(table)}")
        return self.column

    def _found_column(self, table: Table) -> str:
        """The column of text or conversations, if only one can be meant."""
        for name in (_TEXT_COLUMN, *CHAT_COLUMNS):
            if name in table.columns:
                return name
        if not table.columns:
            raise UsageError(f"{self.name} has no rows")
        readable = _readable(table)
        if len(readable) != 1:
            raise UsageError(f"{self.name} has no column 'text', 'messages' or 'conversations'{_advice(table)}")
        return readable[0]

    def _documents(self, table: Table, column: str) -> Iterator[str]:
        for number, value in table.column(column):
            place = f"{self.name}, {table.unit} {number}, column {column!r}"
            if isinstance(value, str):
                yield value
            elif is_conversation(value):
                try:
                    yield self.render(messages_of(value))
                except UsageError as error:
                    raise UsageError(f"{place}: {error}") from error
            elif not _is_empty(value):
                raise UsageError(
                    f"{place} holds {described(value)}, neither text nor a conversation: correct or remove this "
                    f"{table.unit}{_advice(table, column, 'or write')}"
                )


def _is_empty(value: Any) -> bool:
    """Whether a value is a conversation without a message."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and not value


def _readable(table: Table) -> list[str]:
    """The columns whose first value, empty conversations aside, is text or a conversation."""
    return [name for name in table.columns if _is_readable(table, name)]


def _is_readable(table: Table, column: str) -> bool:
    try:
        first = next((value for _, value in table.column(column) if value is not None and not _is_empty(value)), None)
    except UsageError:  # a row lacks it
        return False
    return isinstance(first, str) or is_conversation(first)


def _advice(table: Table, column: str | None = None, verb: str = "write") -> str:
    """Which other columns may be named, to be put behind what is wrong; nothing where there is none."""
    others = [name for name in _readable(table) if name != column]
    if others:
        link = ":" if verb == "write" else ","
        return f"{link} {verb} ?column= and one of {', '.join(others)}"
    return "" if column else " and no other column of text or conversations"
