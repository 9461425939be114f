"""Tokenize a long text piece by piece, with the ids that the tokenizer gives for the text at once.

A text is cut only where the result is known to be the same: between two words of lower-case ASCII letters, ``x| y``.

1. No entry of the vocabulary holds a letter that a space follows, so no token reaches across the cut, and neither the
   merges of BPE nor the best path of Unigram depend on the other side.
2. Normalizer and pre-tokenizer are of kinds that look at what stands near, and no pattern of theirs reaches over the
   cut (`stages.data.tokenizer_parts`).
3. Both neighbours of the cut are tokenized with `_CONTEXT` characters of the other side, and must agree on every token
   near it.

Where one of these fails, and for tokenizers without character offsets, the text is tokenized at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.data.tokenizer_parts import are_local

_PIECE = 1 << 14  # characters
_CONTEXT = 512  # characters of the other side that a piece is tokenized with
_CUT = re.compile(r"(?<=[a-z]) (?=[a-z])")
# A space inside a vocabulary entry: as it is, as SentencePiece writes it, or as byte-level BPE does.
_WORDS_IN_ONE_TOKEN = re.compile("[a-z][ \u2581\u0120]")

# Called with the number of characters that are tokenized, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ends:
    """The token ids that a tokenizer adds at the head and at the end of a text."""

    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Ends:
        """What this tokenizer adds, found on a text of one letter."""
        plain = _ids(tokenizer, "a")
        whole = tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return cls(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
        return cls((), ())


def token_pieces(tokenizer: Any, text: str, progress: Progress | None = None) -> Iterator[Tensor]:
    """Token ids of a text, without what the tokenizer adds at its ends, in pieces that joined are those of the whole.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The text. Of a text that is not read to its end, only the part that was asked for is tokenized.
        progress: Called after each piece.

    Yields:
        Token ids, (n,) each.
    """
    pieces = _pieces(tokenizer, text) if len(text) > 2 * _PIECE and _can_cut(tokenizer) else iter(())
    num_given = end = 0
    for ids, end in pieces:
        num_given += len(ids)
        yield ids
        if progress is not None:
            progress(end, len(text))
    if end < len(text) or not text:
        yield torch.tensor(_ids(tokenizer, text), dtype=torch.long)[num_given:]
        if progress is not None:
            progress(len(text), len(text))


def _pieces(tokenizer: Any, text: str) -> Iterator[tuple[Tensor, int]]:
    """The pieces and where each ends. Stops early, before a piece with a cut where both sides disagree."""
    start, before = 0, None
    checked: tuple[Tensor, int] | None = None  # all but its end
    while start < len(text):
        cut = _CUT.search(text, start + _PIECE)
        end = cut.start() if cut is not None else len(text)
        chunk = _Chunk.of(tokenizer, text, max(start - _CONTEXT, 0), min(end + _CONTEXT, len(text)))
        if before is not None and not before.agrees_with(chunk, start):
            return
        if checked is not None:
            yield checked
        ids = chunk.between(start, end)
        if ids is None:
            return
        start, before, checked = end, chunk, (ids, end)
    if checked is not None:
        yield checked


@dataclass(frozen=True)
class _Chunk:
    """A part of the text, tokenized on its own."""

    ids: Tensor  # (n,)
    starts: Tensor  # (n,) first character of each token, counted from the start of the text
    ends: Tensor  # (n,)

    @classmethod
    def of(cls, tokenizer: Any, text: str, start: int, end: int) -> _Chunk:
        found = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = torch.tensor(found["offset_mapping"], dtype=torch.long).view(-1, 2) + start
        return cls(torch.tensor(found["input_ids"], dtype=torch.long), offsets[:, 0], offsets[:, 1])

    def between(self, start: int, end: int) -> Tensor | None:
        """The ids of the tokens from `start` to `end`; None where a token reaches across one of them."""
        before, after = self.starts < start, self.starts >= end
        inside = ~before & ~after
        if bool((before & (self.ends > start)).any()) or bool((inside & (self.ends > end)).any()):
            return None
        return self.ids[inside]

    def agrees_with(self, other: _Chunk, cut: int) -> bool:
        """Whether both have the same tokens near the cut, on both of its sides."""
        near, its = self._near(cut), other._near(cut)
        has_both_sides = bool((near[:, 1] < cut).any()) and bool((near[:, 2] > cut).any())
        return has_both_sides and torch.equal(near, its)

    def _near(self, cut: int) -> Tensor:
        """Id, start and end, (n, 3), of the tokens within half of the context."""
        chosen = (self.ends > cut - _CONTEXT // 2) & (self.starts < cut + _CONTEXT // 2)
        return torch.stack([self.ids, self.starts, self.ends], 1)[chosen]


def _can_cut(tokenizer: Any) -> bool:
    """Whether the tokenizer gives offsets, its parts are local, and no token holds the end of a word and a space."""
    if not tokenizer.is_fast or any(map(_WORDS_IN_ONE_TOKEN.search, tokenizer.get_vocab())):
        return False
    return are_local(tokenizer.backend_tokenizer)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
