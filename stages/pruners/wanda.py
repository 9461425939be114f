"""Wanda (Sun et al., 2023): magnitude times the norm of the input channel, compared within each output row."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.topk import smallest_per_row


def wanda_mask(weight: Tensor, mean_square: Tensor, num_masked: int, pattern: Pattern | None = None) -> Tensor:
    """True at the pruned weights, `num_masked` in all.

    weight: (rows, cols). mean_square: (cols,), the mean of x^2 per input channel over the calibration tokens.
    Every row loses num_masked // rows; what remains is one more in each of the first rows. With a pattern, every
    group of M columns loses N instead.
    """
    scores = weight.abs() * mean_square.sqrt()
    if pattern is not None:
        return pattern.mask(scores)
    per_row, remainder = divmod(num_masked, weight.shape[0])
    # Rows that lose one more come first; neither part may be empty for kthvalue's sake.
    parts = [
        smallest_per_row(part, count)
        for part, count in ((scores[:remainder], per_row + 1), (scores[remainder:], per_row))
        if len(part)
    ]
    return torch.cat(parts)
