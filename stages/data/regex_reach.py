"""Which texts a pattern of a tokenizer can match across: read from the pattern itself, before any text is seen.

A pattern that matches no lower-case letter with a space behind it stops at ``x| y`` wherever it began, and a search
from there on does not depend on what came before. `<q>.*?</q>` is no such pattern: whether it matches depends on text
at any distance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MAX_LOOK = 16  # characters that may be looked at without being matched
_MANY = 1 << 16

_GROUP = re.compile(r"\?(?:(?P<plain>:|>)|(?P<look><?[=!])|(?P<flags>[imx]*(?:-[imx]+)?)(?P<scope>[:)]))")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^A-Za-z0-9]|[sSdDwWhHrntfvae])"
)
_ANCHORS = ("\\b", "\\B", "\\A", "\\z", "\\Z", "^", "$")


class UnknownPatternError(ValueError):
    """A pattern holds something of which this module does not know what it matches."""


def stops_between_words(pattern: str, space: str = " ") -> bool:
    """Whether no match, and no search for one, reaches from a lower-case letter over a space behind it.

    Args:
        pattern: A regular expression of Oniguruma, which the package tokenizers uses.
        space: What a space has become before the pattern sees it.

    Returns:
        False, too, for a pattern that is not understood.
    """
    try:
        return not _Parser(pattern, space).whole().crosses
    except UnknownPatternError:
        return False


def matches_one_of(pattern: str, characters: str) -> bool:
    """Whether a pattern matches one of these characters on its own. Raises UnknownPatternError if it is no pattern."""
    from tokenizers import Regex, pre_tokenizers

    try:
        split = pre_tokenizers.Split(Regex(pattern), "removed")
    except Exception as error:  # the package raises nothing more special
        raise UnknownPatternError(f"{pattern}: {error}") from error
    return any(not split.pre_tokenize_str(character) for character in characters)


@dataclass(frozen=True)
class _Part:
    """What a part of a pattern can match, as far as it matters: letters and spaces at its ends."""

    is_nullable: bool  # it may match nothing
    starts_with_space: bool
    ends_with_letter: bool
    crosses: bool  # it may match a letter with a space behind it
    max_length: int

    def then(self, other: _Part) -> _Part:
        """This part and the other one behind it."""
        return _Part(
            self.is_nullable and other.is_nullable,
            self.starts_with_space or (self.is_nullable and other.starts_with_space),
            other.ends_with_letter or (other.is_nullable and self.ends_with_letter),
            self.crosses or other.crosses or (self.ends_with_letter and other.starts_with_space),
            min(self.max_length + other.max_length, _MANY),
        )

    def or_else(self, other: _Part) -> _Part:
        """This part or the other one."""
        return _Part(
            self.is_nullable or other.is_nullable,
            self.starts_with_space or other.starts_with_space,
            self.ends_with_letter or other.ends_with_letter,
            self.crosses or other.crosses,
            max(self.max_length, other.max_length),
        )

    def repeated(self, low: int, high: int) -> _Part:
        """This part, from `low` to `high` times."""
        again = high > 1 and self.ends_with_letter and self.starts_with_space
        return _Part(
            self.is_nullable or low == 0,
            self.starts_with_space,
            self.ends_with_letter,
            self.crosses or again,
            min(self.max_length * high, _MANY),
        )


_NOTHING = _Part(True, False, False, False, 0)


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str, space: str) -> None:
        self._text, self._space, self._at = pattern, space, 0

    def whole(self) -> _Part:
        """The whole pattern. Raises UnknownPatternError."""
        matches_one_of(self._text, "")
        found = self._alternatives("")
        if self._at < len(self._text):
            raise UnknownPatternError(f"{self._text}: a parenthesis too many")
        return found

    def _alternatives(self, flags: str) -> _Part:
        found, flags = self._sequence(flags)
        while self._takes("|"):
            other, flags = self._sequence(flags)
            found = found.or_else(other)
        return found

    def _sequence(self, flags: str) -> tuple[_Part, str]:
        """Parts up to | or ), and the flags that hold behind them."""
        found = _NOTHING
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part, flags = self._item(flags)
            found = found.then(self._counted(part))
        return found, flags

    def _item(self, flags: str) -> tuple[_Part, str]:
        if self._takes("("):
            return self._group(flags)
        for anchor in _ANCHORS:
            if self._takes(anchor):
                return _NOTHING, flags
        return self._character(flags), flags

    def _group(self, flags: str) -> tuple[_Part, str]:
        start = _GROUP.match(self._text, self._at)
        if start is None:
            if self._text[self._at : self._at + 1] in ("?", "*"):
                raise UnknownPatternError(f"{self._text}: a group of an unknown kind")
            return self._closed(self._alternatives(flags)), flags
        self._at = start.end()
        if start["look"] is not None:
            seen = self._closed(self._alternatives(flags))
            if seen.max_length > _MAX_LOOK:
                raise UnknownPatternError(f"{self._text}: it looks further than {_MAX_LOOK} characters")
            return _NOTHING, flags
        if start["plain"] is not None:
            return self._closed(self._alternatives(flags)), flags
        if "x" in start["flags"]:
            raise UnknownPatternError(f"{self._text}: spaces in it have no meaning")
        inner = f"{flags}(?{start['flags']})" if start["flags"] else flags
        if start["scope"] == ")":
            return _NOTHING, inner
        return self._closed(self._alternatives(inner)), flags

    def _closed(self, part: _Part) -> _Part:
        if not self._takes(")"):
            raise UnknownPatternError(f"{self._text}: a parenthesis is missing")
        return part

    def _character(self, flags: str) -> _Part:
        """One character: itself, an escape, a class or a dot. tokenizers says what it matches."""
        start = self._at
        if self._takes("["):
            self._skip_class()
        elif self._text[start] == "\\":
            escape = _ESCAPE.match(self._text, start)
            if escape is None:
                raise UnknownPatternError(f"{self._text}: an unknown escape at {start}")
            self._at = escape.end()
        elif self._text[start] in "*+?":
            raise UnknownPatternError(f"{self._text}: a count without a character")
        else:
            self._at += 1
        one = flags + self._text[start : self._at]
        return _Part(False, matches_one_of(one, self._space), matches_one_of(one, LETTERS), False, 1)

    def _skip_class(self) -> None:
        depth, is_first = 1, True
        while depth:
            if self._at >= len(self._text):
                raise UnknownPatternError(f"{self._text}: a class without an end")
            character = self._text[self._at]
            self._at += 2 if character == "\\" else 1
            if character == "[":
                depth += 1
                is_first = True
                continue
            if character == "]" and not is_first:
                depth -= 1
            is_first = is_first and character == "^"

    def _counted(self, part: _Part) -> _Part:
        """The part with the counts behind it."""
        while True:
            count = _COUNT.match(self._text, self._at)
            if self._takes("*"):
                part = part.repeated(0, _MANY)
            elif self._takes("+"):
                part = part.repeated(1, _MANY)
            elif self._takes("?"):
                part = part.repeated(0, 1)
            elif count is not None and (count[1] or count[3]):
                self._at = count.end()
                low = int(count[1] or 0)
                part = part.repeated(low, int(count[3]) if count[3] else (_MANY if count[2] else low))
            else:
                return part

    def _takes(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True
