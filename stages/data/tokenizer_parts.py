"""Whether the parts of a tokenizer that change and split a text do so by what stands near, wherever the text begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.data.regex_reach import LETTERS, UnknownPatternError, matches_one_of, stops_between_words

_LOCAL_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "BertNormalizer", "Precompiled"}
    | {"Prepend", "Strip", "ByteLevel"}
)
_LOCAL_PRE_TOKENIZERS = frozenset(
    {"ByteLevel", "BertPreTokenizer", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"}
    | {"UnicodeScripts", "CharDelimiterSplit"}
)
# What may stand for a space in a vocabulary: itself, the sign of SentencePiece, that of byte-level BPE.
_SPACES = " \u2581\u0120"


def are_local(backend: Any) -> bool:
    """Whether normalizer and pre-tokenizer are known to treat a text between two words as if it began or ended there.

    Args:
        backend: A `tokenizers.Tokenizer`.
    """
    space = " "  # what has become of the space between the words
    try:
        for part in _parts(backend.normalizer, "normalizers"):
            if not _is_local_normalizer(part, space):
                return False
            space = _space_after(part, space)
        for part in _parts(backend.pre_tokenizer, "pretokenizers"):
            if not _is_local_pre_tokenizer(part, space):
                return False
            space = _space_after(part, space)
    except UnknownPatternError:
        return False
    return True


def _parts(component: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a component of a tokenizer, as its file describes them."""
    if component is None:
        return
    try:
        described = json.loads(component.__getstate__())
    except Exception as error:  # one that is written in Python has no description; the package raises Exception
        raise UnknownPatternError(str(error)) from error
    waiting = [described]
    while waiting:
        part = waiting.pop()
        if part["type"] == "Sequence":
            waiting.extend(reversed(part[key]))
        else:
            yield part


def _is_local_normalizer(part: Mapping[str, Any], space: str) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _LOCAL_NORMALIZERS
    pattern = _pattern(part)
    if not stops_between_words(pattern, space) or matches_one_of(pattern, LETTERS):
        return False
    # What stands for the space of a cut must be a space to the vocabulary, too.
    return _space_after(part, space) in tuple(_SPACES)


def _is_local_pre_tokenizer(part: Mapping[str, Any], space: str) -> bool:
    if part["type"] != "Split":
        return part["type"] in _LOCAL_PRE_TOKENIZERS
    return stops_between_words(_pattern(part), space)


def _space_after(part: Mapping[str, Any], space: str) -> str:
    """What a space between two words has become after a part; several characters are as one where they are equal."""
    if part["type"] == "Replace" and matches_one_of(_pattern(part), space):
        return "".join(set(part["content"]))
    if part["type"] == "Metaspace":
        return str(part["replacement"])
    return "\u0120" if part["type"] == "ByteLevel" else space


def _pattern(part: Mapping[str, Any]) -> str:
    """Its regular expression; of a plain text, one that matches just that."""
    ((kind, text),) = part["pattern"].items()
    return str(text) if kind == "Regex" else re.sub(r"(\W)", r"\\\1", text)
