"""Masks of the smallest scores: exact counts, ties broken by position, no full sort."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask with the shape of `scores`, True at exactly the `count` smallest; among equals, the first.

    Raises:
        ValueError: A score is NaN, or there are fewer than `count` scores.
    """
    flat = scores.reshape(1, -1)
    return smallest_per_row(flat, count).reshape(scores.shape)


def smallest_per_row(scores: Tensor, count: int) -> Tensor:
    """`smallest` for each row of `scores` (rows, cols) separately, `count` in each row."""
    if not 0 <= count <= scores.shape[1]:
        raise ValueError(f"{count} of {scores.shape[1]} scores cannot be chosen")
    if bool(torch.isnan(scores).any()):
        raise ValueError("the scores hold NaN")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    equal = scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1) <= missing))
