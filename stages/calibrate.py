"""Sample the calibration set: token ids from a data source, which a run then keeps unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stages.data.bos import Framing
from stages.data.drawing import Drawing
from stages.data.pieces import Progress
from stages.data.text_source import TextSource
from stages.data.tokenization import calibration_tokens, load_tokenizer
from stages.interfaces import Watcher
from stages.models.base import ModelFolder


def calibrate(source: TextSource, model: ModelFolder, drawing: Drawing, watcher: Watcher) -> Tensor:
    """Sample token ids from a data source with the model's own tokenizer.

    Args:
        source: The data source.
        model: The model folder, which holds the tokenizer.
        drawing: Which samples.
        watcher: Shows progress, and may stop the work.

    Returns:
        Token ids, (num_samples, tokens).

    Raises:
        UsageError: The source holds too few tokens.
        ResourceError: The source cannot be reached.
    """

    def progress(done: int, total: int) -> None:
        watcher.check_stop()
        watcher.report(done, total, "characters")

    return draw_tokens(source, load_tokenizer(model.path, trusts_code=model.trusts_code), drawing, progress)


def draw_tokens(source: TextSource, tokenizer: Any, drawing: Drawing, progress: Progress | None = None) -> Tensor:
    """As `calibrate`, with a tokenizer that is loaded already. progress: called while a long text is tokenized."""
    framing = Framing.of(tokenizer, drawing.bos)
    text = source.for_model(tokenizer, drawing.chat_template)
    drawn = replace(drawing, tokens=framing.text_tokens(drawing.tokens))
    return framing.framed(calibration_tokens(text, framing.tokenizer, drawn, progress))
