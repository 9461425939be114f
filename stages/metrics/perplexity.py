"""Perplexity as SparseGPT, Wanda and LAMP report it: windows that do not overlap, each read on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import UsageError


def windows(tokens: Tensor, seqlen: int, max_tokens: int | None = None, max_windows: int | None = None) -> Tensor:
    """`tokens` (n,) cut into pieces (windows, seqlen); the tail is dropped.

    max_tokens: use only so many tokens from the start. Raises UsageError if there is not one whole window.
    """
    used = tokens if max_tokens is None else tokens[:max_tokens]
    count = len(used) // seqlen
    if max_windows is not None:
        count = min(count, max_windows)
    if count == 0:
        raise UsageError(
            f"{len(used):,} tokens do not fill one window of {seqlen}: use more text or less --eval-seqlen"
        )
    return used[: count * seqlen].view(count, seqlen)


def window_loss(logits: Tensor, window: Tensor) -> float:
    """Mean cross-entropy, in nats, of each next token. logits: (1, T, V); window: token ids (1, T)."""
    return functional.cross_entropy(logits[0, :-1].float(), window[0, 1:]).item()


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean over windows; infinity where that overflows."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf
