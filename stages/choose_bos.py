"""Choose where BOS stands, by the perplexity of the original model on a few windows with and without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stages.data.bos import Framing, adds_bos
from stages.data.text_source import Bos, TextSource, Use
from stages.data.tokenization import first_tokens, require_vocabulary
from stages.in_memory import WithoutCheckpoints
from stages.metrics.base import MetricContext
from stages.metrics.language import windows
from stages.metrics.perplexity import PerplexityScore, perplexity
from stages.metrics.streaming import window_values

NUM_WINDOWS = 8
# BOS must lower the perplexity by this share. It does so by a few percent for models that do without it (OPT, Llama-2),
# whose published perplexities have it at the head of the text alone, and by more than half for Gemma 3.
_CLEAR_SHARE = 0.1


@dataclass(frozen=True)
class BosChoice:
    """Where BOS stands, and the perplexities that decided (None: nothing was measured; infinite: it overflowed)."""

    mode: Bos
    perplexity_without: float | None = None
    perplexity_with: float | None = None

    @property
    def sentence(self) -> str | None:
        """The choice for people, in one line; None where nothing was measured."""
        if self.perplexity_with is None or self.perplexity_without is None:
            return None
        chosen = "at the head of each window" if self.mode == "window" else "at the head of the text only"
        measured = f"{self.perplexity_with:.4g} with BOS at the head of a window, {self.perplexity_without:.4g} without"
        return f"BOS stands {chosen}: the original model's perplexity is {measured}"


def choose_bos(context: MetricContext, tokenizer: Any, use: Use) -> BosChoice:
    """Measure the original model on the first windows of a text, with BOS at the head of each and without.

    Args:
        context: The original model, a data source of text, and the tokens of a window.
        tokenizer: The model's tokenizer.
        use: Which text of the data source.

    Returns:
        "window" where BOS lowers the perplexity clearly. Otherwise "stream", without measuring where the tokenizer adds
        no BOS by itself.
    """
    if not adds_bos(tokenizer):
        return BosChoice("stream")
    source, seqlen = context.source, context.protocol.seqlen
    assert isinstance(source, TextSource)
    source = source.for_model(tokenizer, context.protocol.chat_template)
    framing = Framing.of(tokenizer, "window")
    needed = NUM_WINDOWS * framing.text_tokens(seqlen)
    text = first_tokens(framing.tokenizer, source.text(use), needed)[:needed]
    require_vocabulary(text, context.model.vocab_size, context.model.source.name)
    plain = windows(text, framing.text_tokens(seqlen))
    context = replace(context, callbacks=WithoutCheckpoints(context.callbacks))
    without, with_bos = (
        perplexity(window_values(context, tokens, PerplexityScore())) for tokens in (plain, framing.framed(plain))
    )
    is_better = with_bos < (1 - _CLEAR_SHARE) * without and math.isfinite(with_bos)
    return BosChoice("window" if is_better else "stream", without, with_bos)
