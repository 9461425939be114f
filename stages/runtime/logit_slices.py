"""Slices of a sample's tokens whose logits are in memory together: a vocabulary may have 262,144 tokens."""

from __future__ import annotations

from collections.abc import Iterator

# Most numbers of one matrix of logits: 64 MB in fp32.
LOGITS_AT_ONCE = 2**24


def token_slices(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Cut `num_tokens` tokens into slices with at most `LOGITS_AT_ONCE` logits each, at least one token."""
    size = max(LOGITS_AT_ONCE // vocab_size, 1)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
