"""Sample the calibration set: token ids from a data source, which a run then keeps unchanged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stages.data.bos import Framing
from stages.data.drawing import Drawing
from stages.data.text_source import TextSource
from stages.data.tokenization import calibration_tokens, load_tokenizer
from stages.models.base import ModelFolder


def calibrate(source: TextSource, model: ModelFolder, drawing: Drawing) -> Tensor:
    """Sample token ids from a data source with the model's own tokenizer.

    Args:
        source: The data source.
        model: The model folder, which holds the tokenizer.
        drawing: Which samples.

    Returns:
        Token ids, (num_samples, tokens).

    Raises:
        UsageError: The source holds too few tokens.
        ResourceError: The source cannot be reached.
    """
    return draw_tokens(source, load_tokenizer(model.path, trusts_code=model.trusts_code), drawing)


def draw_tokens(source: TextSource, tokenizer: Any, drawing: Drawing) -> Tensor:
    """As `calibrate`, with a tokenizer that is loaded already."""
    framing = Framing.of(tokenizer, drawing.bos)
    tokens = calibration_tokens(
        source.for_model(tokenizer, drawing.chat_template),
        framing.tokenizer,
        drawing.num_samples,
        framing.text_tokens(drawing.tokens),
        drawing.sampling,
        drawing.skip,
        drawing.seed,
    )
    return framing.framed(tokens)
