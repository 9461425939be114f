"""Options behind the path of a data source: ``jsonl:FILE?column=text``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from stages.errors import UsageError


def split_query(kind: str, text: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The path and its options.

    Args:
        kind: Of the data source, for messages.
        text: What follows the colon.
        known: Names of the options that this kind has.

    Raises:
        UsageError: An option is unknown, given twice, or empty.
    """
    path, mark, query = text.partition("?")
    if not mark:
        return path, {}
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True) or [(query, "")]:
        if name not in known or not value or name in options:
            expected = "&".join(f"{option}=NAME" for option in known)
            raise UsageError(f"{kind}:{text}: {name}={value} is not understood; write {kind}:{path}?{expected}")
        options[name] = value
    return path, {option: options[option] for option in known if option in options}


def with_query(name: str, options: Mapping[str, str | None]) -> str:
    """A canonical name with its options: those that are given."""
    given = "&".join(f"{option}={value}" for option, value in options.items() if value is not None)
    return f"{name}?{given}" if given else name
