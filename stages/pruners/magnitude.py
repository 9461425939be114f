"""Magnitude pruning: the smallest weights of a layer, or of each N:M group, go."""

from __future__ import annotations

from torch import Tensor

from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.topk import smallest


def magnitude_mask(weight: Tensor, num_masked: int, pattern: Pattern | None = None) -> Tensor:
    """True at the `num_masked` weights of smallest magnitude, or where the pattern says. weight: (rows, cols)."""
    return smallest(weight.abs(), num_masked) if pattern is None else pattern.mask(weight.abs())
