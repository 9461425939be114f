"""Top-1 accuracy: how often the model's first choice is the next token of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.metrics.base import Measurement, MetricContext
from stages.metrics.language import LanguageMetric

if TYPE_CHECKING:
    from torch import Tensor


class TokenAccuracy(LanguageMetric):
    """The share of next tokens that the model ranks first, over the windows that perplexity reads."""

    name = "token-accuracy"
    title = "token accuracy"
    help = "Share of next tokens that the model ranks first."
    digits = 4
    higher_is_better = True
    least, most = 0.0, 1.0

    def measure(self, context: MetricContext) -> Measurement:
        from stages.metrics.streaming import read_windows, window_values

        text = read_windows(context)
        score = _Score()
        value = score.mean(window_values(context, text.windows, score))
        return Measurement(self.name, value, context.source.name, text.is_partial, text.details)


class _Score:
    """Counts right first choices (`stages.metrics.streaming.TokenScore`)."""

    name = "accuracy"

    def total(self, logits: Tensor, following: Tensor) -> float:
        """logits: (S, V); following: the tokens that follow, (S,)."""
        return float((logits.argmax(dim=-1) == following).sum())

    def mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)
