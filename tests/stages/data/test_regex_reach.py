"""Patterns of tokenizers: those of published models stop between two words, those that reach further are found."""

from __future__ import annotations

import re

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from stages.data.regex_reach import stops_between_words
from stages.data.tokenizer_parts import are_local
from tests.stages.data.test_pieces import GPT2, LLAMA3

QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
STOPPING = [
    *(
        GPT2,
        LLAMA3,
        QWEN2,
        O200K,
        DEEPSEEK_V3,
        BLOOM,
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
    ),
    *(
        " ",
        " {2,}",
        r"\s+",
        "\u2581+",
        r"\s+$",
        r"\w+",
        r"[0-9][0-9][0-9]",
        "",
        r"\(x\)",
        r"[]a]",
        r"[^]\s]+",
        r"a{2}",
        "b{,3}",
    ),
]
CROSSING = [
    *(r"<q>.*?</q>|\w+|\s+", r"\(.*?\)", r"(?m)<q>.*?</q>", "of the", r"\w+ \w+", r"(?:[^ ]+ [^ ]+ ?)", r"(\w+ ?)+"),
    *(r"[^\n]+", r".{2}", r"[a-z](,| )", r"(?:x|y)?(?:,? )", r"\S+\s*", r"(?i)OF THE", r"[^\d]*", "a\\x20", r"(?>a+ )"),
    *(r"[\S\s]+?x", "(a|b|)  ?"),
]
UNKNOWN = [
    r"(a)\1",
    r"\K",
    r"(?<=a+)b",
    r"a(?=.*b)",
    r"(?x) a",
    "(?~ab)",
    r"\X",
    r"(?<name>a)\g<name>",
    "[a",
    "a)",
    "(?#c)",
]
# The published pattern of numbers in groups of three looks over a whole number.
STOPPING.remove(r"\d{1,3}(?=(?:\d{3})*\b)")
UNKNOWN.append(r"\d{1,3}(?=(?:\d{3})*\b)")


@pytest.mark.parametrize("pattern", STOPPING)
def test_patterns_that_stop_between_words(pattern):
    assert stops_between_words(pattern)


@pytest.mark.parametrize("pattern", CROSSING + UNKNOWN)
def test_patterns_that_reach_over_a_space_or_are_not_understood(pattern):
    assert not stops_between_words(pattern)


@pytest.mark.parametrize("pattern", [p for p in STOPPING if p] + CROSSING)
def test_what_is_said_is_what_oniguruma_finds(pattern):
    """Every text of up to four of these characters, matched: a letter before a space is in a match, or is in none."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    texts = [""]
    for _ in range(4):
        texts += [text + c for text in texts for c in "ab ,x"]
    crossed = False
    for text in {*texts, "of the", "OF THE", "(of the)", "<q>of x</q>"}:
        removed = [True] * len(text)
        for _, (start, end) in split.pre_tokenize_str(text):
            removed[start:end] = [False] * (end - start)
        isolated = [span for _, span in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
        for found in re.finditer("[a-z] ", text):
            inside = any(start < found.start() + 1 < end for start, end in isolated)
            crossed |= inside and all(removed[found.start() : found.end()])
    assert crossed != stops_between_words(pattern)


def backend(normalizer=None, pre_tokenizer=None):
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


@pytest.mark.parametrize("space", [" ", "\u2581", "\u0120"])
def test_a_space_may_have_become_another_character(space):
    for pattern in (r"\p{Ll}{3}" + space, f"a{space}", "[^,]{2}"):
        assert not stops_between_words(pattern, space)
    assert stops_between_words(r" ?\p{L}+", " ")
    assert stops_between_words(f"{space}+|[a-z]+", space)
    assert stops_between_words(r"\w+", space) == (space != "\u0120")  # which is a letter


N, P = normalizers, pre_tokenizers
LOCAL = {
    "nothing": backend(),
    "Llama 2": backend(N.Sequence([N.Prepend("\u2581"), N.Replace(" ", "\u2581")])),
    "T5": backend(N.Sequence([N.NFKC(), N.Replace(Regex(" {2,}"), " ")]), P.Metaspace()),
    "ALBERT": backend(N.Sequence([N.Replace("``", '"'), N.Replace("''", '"'), N.NFKD(), N.Lowercase()]), P.Metaspace()),
    "Llama 3": backend(None, P.Sequence([P.Split(Regex(LLAMA3), "isolated"), P.ByteLevel(use_regex=False)])),
    "BERT": backend(N.BertNormalizer(), P.BertPreTokenizer()),
    "Falcon": backend(
        None, P.Sequence([P.Punctuation(), P.ByteLevel(), P.Digits(), P.Split(Regex("[0-9]{3}"), "isolated")])
    ),
}
NOT_LOCAL = {
    "a span": backend(None, P.Split(Regex(r"<q>.*?</q>|\w+"), "isolated")),
    "a span in a sequence": backend(
        None, P.Sequence([P.ByteLevel(), P.Sequence([P.Split(Regex(r"\(.*?\)"), "removed")])])
    ),
    "a span replaced": backend(N.Sequence([N.Strip(), N.Replace(Regex(r"\(.*?\)"), "#")])),
    "two words": backend(N.Replace("of the", "#")),
    "letters replaced": backend(N.Replace(Regex("[aeiou]"), "")),
    "spaces deleted": backend(N.Replace(" ", "")),
    "spaces as another character": backend(N.Replace(Regex(r"\s"), "~")),
    "words of any signs behind SentencePiece's": backend(N.Replace(" ", "\u2581"), P.Split(Regex(r"\S+"), "isolated")),
    "letters behind byte-level BPE": backend(None, P.Sequence([P.ByteLevel(), P.Split(Regex(r"\w+"), "isolated")])),
    "a fixed number of characters": backend(None, P.FixedLength(5)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_parts_of_published_tokenizers_are_local(name):
    assert are_local(LOCAL[name])


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_parts_that_look_further_are_not(name):
    assert not are_local(NOT_LOCAL[name])


def test_parts_written_in_python_are_not_known():
    class Mine:
        def pre_tokenize(self, pretokenized):
            """Splits nothing."""

    made = backend(None, P.PreTokenizer.custom(Mine()))
    assert not are_local(made)
