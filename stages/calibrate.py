"""The calibration set: token ids drawn from a source, as the run will see them to its end."""

from __future__ import annotations

from torch import Tensor

from stages.data.text_sources import Source
from stages.data.tokenization import calibration_tokens, load_tokenizer
from stages.models.base import ModelFolder


def calibrate(
    source: Source,
    model: ModelFolder,
    *,
    num_samples: int,
    seqlen: int,
    sampling: str | None,
    skip: int,
    seed: int,
) -> Tensor:
    """Token ids (num_samples, seqlen) from `source`, by the tokenizer that the model ships with.

    Raises UsageError if the source holds too few tokens, ResourceError if it is out of reach.
    """
    tokenizer = load_tokenizer(model.path, trusts_code=model.trusts_code)
    return calibration_tokens(source, tokenizer, num_samples, seqlen, sampling, skip, seed)
