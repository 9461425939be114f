"""Sample the calibration set: token ids from a data source, which a run then keeps unchanged."""

from __future__ import annotations

from torch import Tensor

from stages.data.text_source import TextSource
from stages.data.tokenization import calibration_tokens, load_tokenizer
from stages.models.base import ModelFolder


def calibrate(
    source: TextSource,
    model: ModelFolder,
    *,
    num_samples: int,
    seqlen: int,
    sampling: str | None,
    skip: int,
    seed: int,
) -> Tensor:
    """Sample token ids from a data source with the model's own tokenizer.

    Args:
        source: The data source.
        model: The model folder, which holds the tokenizer.
        num_samples: How many samples.
        seqlen: Tokens of each sample.
        sampling: "contiguous" or "random"; None: the default of the source.
        skip: Samples to leave out first.
        seed: For random sampling.

    Returns:
        Token ids, (num_samples, seqlen).

    Raises:
        UsageError: The source holds too few tokens.
        ResourceError: The source cannot be reached.
    """
    tokenizer = load_tokenizer(model.path, trusts_code=model.trusts_code)
    return calibration_tokens(source, tokenizer, num_samples, seqlen, sampling, skip, seed)
