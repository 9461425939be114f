"""Perplexity as SparseGPT, Wanda and LAMP report it: windows that do not overlap, each read on its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.metrics.base import Measurement, MetricContext
from stages.metrics.language import LanguageMetric

if TYPE_CHECKING:
    from torch import Tensor


class Perplexity(LanguageMetric):
    """exp of the mean over windows of the mean next-token cross-entropy."""

    name = "perplexity"
    title = "perplexity"
    help = "Perplexity over windows of text that do not overlap, as SparseGPT, Wanda and LAMP report it."
    digits = 2
    higher_is_better = False
    least = 1.0  # a cross-entropy is not negative

    def measure(self, context: MetricContext) -> Measurement:
        from stages.metrics.streaming import read_windows, window_values

        text = read_windows(context)
        value = perplexity(window_values(context, text.windows, PerplexityScore()))
        return Measurement(self.name, value, context.source.name, text.is_partial, text.details)


class PerplexityScore:
    """The cross-entropy of next tokens, in nats (`stages.metrics.streaming.TokenScore`)."""

    name = "perplexity"

    def total(self, logits: Tensor, following: Tensor) -> float:
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), following, reduction="sum").item()

    def mean(self, values: Sequence[float]) -> float:
        return perplexity(values)


def window_loss(logits: Tensor, window: Tensor) -> float:
    """Mean cross-entropy, in nats, of each next token. logits: (1, T, V); window: token ids (1, T)."""
    following = window[0, 1:]
    return PerplexityScore().total(logits[0, :-1], following) / len(following)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean over windows; infinity where that overflows."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf
