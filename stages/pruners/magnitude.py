"""Magnitude pruning: the smallest weights of a layer go."""

from __future__ import annotations

from torch import Tensor

from stages.pruners.selection import smallest


def magnitude_mask(weight: Tensor, num_masked: int) -> Tensor:
    """True at the `num_masked` weights of smallest magnitude. weight: (rows, cols)."""
    return smallest(weight.abs(), num_masked)
