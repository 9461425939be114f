"""N:M patterns: in every group of M consecutive input columns of a row, N weights are zero.

R: output rows of a weight.    C: its columns, the input channels.    M divides C.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import UsageError

# Settings are validated before torch is imported.
if TYPE_CHECKING:
    from torch import Tensor

LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """`num_zero` of every `group` consecutive weights are zero: "2:4" is Pattern(2, 4)."""

    num_zero: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse "N:M". Raises UsageError unless 0 < N < M <= 32."""
        match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text.strip())
        pattern = cls(*map(int, match.groups())) if match else None
        if pattern is None or not 0 < pattern.num_zero < pattern.group <= LARGEST_GROUP:
            raise UsageError(
                f"{text!r} is no pattern: expected N:M, N zeros in every M weights, with 0 < N < M <= {LARGEST_GROUP} "
                "(2:4 and 4:8 are the usual ones)"
            )
        return pattern

    def __str__(self) -> str:
        return f"{self.num_zero}:{self.group}"

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.num_zero / self.group

    def count(self, size: int) -> int:
        """How many of `size` weights are zero; `size` is a multiple of the group."""
        return size // self.group * self.num_zero

    def mask(self, scores: Tensor) -> Tensor:
        """True at the `num_zero` smallest scores of each group; among equals, the first. scores: (R, C)."""
        from stages.sparsity.topk import smallest_per_row

        grouped = scores.reshape(-1, self.group)
        return smallest_per_row(grouped, self.num_zero).reshape(scores.shape)

    def share_held(self, zeros: Tensor) -> float:
        """The share of groups with at least `num_zero` zeros. zeros: (R, C), True where a weight is zero."""
        grouped = zeros.reshape(-1, self.group).sum(dim=1)
        return (grouped >= self.num_zero).double().mean().item()
