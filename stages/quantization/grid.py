"""Quantization grids: the values that the weights of a row may take.

A grid is asymmetric and belongs to one row, or to one group of columns of a row: value = scale (code - zero), with
codes 0 .. 2^bits - 1. Zero is always on the grid, so that pruned weights are on it, too (SparseGPT, Frantar and
Alistarh, 2023).

R: output rows of a weight.    C: its columns.    G: groups of columns in a row (1 without groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import NumericalError


@dataclass(frozen=True)
class Grid:
    """The quantization grids of a weight: one per row, or one per group of columns in every row."""

    scale: Tensor  # (R, G) fp32, > 0
    zero: Tensor  # (R, G) fp32, the zero point: the code of the value 0, a whole number
    bits: int
    group_size: int  # columns per group; the last group of a row may be shorter

    @property
    def num_levels(self) -> int:
        """Number of values of each grid."""
        return 2**self.bits

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of columns `start` to `stop`: each (R, stop - start), or (R, 1) within one group."""
        first, last = start // self.group_size, (stop - 1) // self.group_size
        if first == last:
            return self.scale[:, first : first + 1], self.zero[:, first : first + 1]
        group = torch.arange(start, stop, device=self.scale.device) // self.group_size
        return self.scale[:, group], self.zero[:, group]

    def codes(self, weight: Tensor) -> Tensor:
        """The code nearest to each weight, ties to even, as fp32 (R, C)."""
        scale, zero = self.columns(0, weight.shape[1])
        return encode(weight.float(), scale, zero, self.num_levels)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes (R, C), as fp32 (R, C)."""
        scale, zero = self.columns(0, codes.shape[1])
        return decode(codes, scale, zero)

    def nearest(self, weight: Tensor) -> Tensor:
        """The grid value nearest to each weight (R, C), in the dtype of `weight`."""
        return self.values(self.codes(weight)).to(weight.dtype)

    def codes_of_stored(self, weight: Tensor) -> Tensor:
        """The codes (R, C), uint8, whose values, rounded to the dtype of `weight`, equal `weight` bit for bit.

        Raises:
            NumericalError: A weight is not on the grid.
        """
        nearest = self.codes(weight)
        found, matched = nearest, torch.zeros_like(nearest, dtype=torch.bool)
        # Rounding to a 16-bit dtype may have moved a value past the middle between two codes.
        for step in (0, -1, 1):
            candidate = (nearest + step).clamp_(0, self.num_levels - 1)
            fits = ~matched & (self.values(candidate).to(weight.dtype) == weight)
            found = torch.where(fits, candidate, found)
            matched |= fits
        if not bool(matched.all()):
            raise NumericalError(f"{int((~matched).sum())} weights are not on their {self.bits}-bit grid")
        return found.to(torch.uint8)


def fit_grid(weight: Tensor, bits: int, group_size: int | None = None) -> Grid:
    """Fit grids that span the weights of each row, or of each `group_size` columns of a row, and zero.

    Source: the quantizer of SparseGPT's code: per output channel, asymmetric, from the minimum to the maximum weight.

    Args:
        weight: (R, C).
        bits: 2 to 8.
        group_size: Columns that share a grid; None: a whole row.
    """
    num_cols = weight.shape[1]
    size = group_size or num_cols
    parts = weight.float().split(size, dim=1)
    low = torch.stack([part.amin(dim=1) for part in parts], dim=1).clamp_(max=0)
    high = torch.stack([part.amax(dim=1) for part in parts], dim=1).clamp_(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = ((high - low) / (2**bits - 1)).clamp_(min=torch.finfo(torch.float32).tiny)
    return Grid(scale, torch.round(-low / scale), bits, size)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, num_levels: int) -> Tensor:
    """The codes of the grid values nearest to `weight`, as whole fp32 numbers. The arguments broadcast."""
    return torch.round(weight / scale).add_(zero).clamp_(0, num_levels - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values of `codes`. The arguments broadcast."""
    return (codes - zero) * scale


def most_levels(weight: Tensor, group_size: int | None = None) -> int:
    """The largest number of distinct values in a row of `weight` (R, C), or in a group of columns of a row."""
    most = 0
    for part in weight.float().split(group_size or weight.shape[1], dim=1):
        ordered = part.sort(dim=1).values
        most = max(most, int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max()) + 1)
    return most
