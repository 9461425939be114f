"""Options behind the path of a data source: ``jsonl:FILE?column=text``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qsl, quote

from stages.errors import UsageError


def split_query(
    kind: str, text: str, known: Sequence[str], is_path: Callable[[str], bool] = lambda path: False
) -> tuple[str, dict[str, str]]:
    """The path and its options.

    A value stands there as in the query of a URL: %2B is a plus sign, a plus sign is a space.

    Args:
        kind: Of the data source, for messages.
        text: What follows the colon.
        known: Names of the options that this kind has.
        is_path: Whether a path is there: of several question marks, the last one behind such a path begins the options.

    Raises:
        UsageError: An option is unknown, given twice, or empty.
    """
    marks = [place for place, character in enumerate(text) if character == "?"]
    if not marks:
        return text, {}
    mark = next((place for place in reversed(marks) if is_path(text[:place])), marks[0])
    path, query = text[:mark], text[mark + 1 :]
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True) or [(query, "")]:
        if name not in known or not value or name in options:
            expected = "&".join(f"{option}=NAME" for option in known)
            raise UsageError(f"{kind}:{text}: {name}={value} is not understood; write {kind}:{path}?{expected}")
        options[name] = value
    return path, {option: options[option] for option in known if option in options}


def with_query(name: str, options: Mapping[str, str | None]) -> str:
    """A canonical name with its options: those that are given, as `split_query` reads them."""
    given = "&".join(f"{option}={_quoted(value)}" for option, value in options.items() if value is not None)
    return f"{name}?{given}" if given else name


def _quoted(value: str) -> str:
    """A value with what a query gives a meaning escaped, and all else as it is."""
    return "".join(quote(c) if c in "%+&" else c for c in value)
