"""Statistics over the inputs of layers: the Hessian, or the mean squares of input channels.

Sources: SparseGPT (Frantar and Alistarh, 2023) for H = 2/n sum x x^T; Wanda (Sun et al., 2023) for the mean squares.

n: tokens.    C: columns of a weight, the input channels.    R: output rows of a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# The sum is symmetric. It is computed in strips of rows, each from the diagonal to the right: little more than half of
# the products. Narrow strips are slow, and each strip is a call: hence a smallest width and a largest number.
_NARROWEST_STRIP, _MOST_STRIPS = 96, 8


class HessianSum:
    """Adds up x x^T over tokens in fp32. After `matrix`, nothing can be added.

    `add` updates the upper triangle only, in strips; `matrix` fills in the lower one.
    """

    def __init__(self, cols: int, device: torch.device) -> None:
        self._sum = torch.zeros(cols, cols, device=device)
        self._num_tokens = 0
        self._is_scaled = False

    def add(self, x: Tensor) -> None:
        """Add the inputs `x`, (tokens, C)."""
        assert not self._is_scaled, "the Hessian has been read"
        x = x.float()
        for rows in self._strips():
            self._sum[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        self._num_tokens += len(x)

    def _strips(self) -> list[slice]:
        cols = len(self._sum)
        count = max(1, min(_MOST_STRIPS, cols // _NARROWEST_STRIP))
        edges = [cols * k // count for k in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """|(W - W') X|^2 / |W X|^2 of weights (R, C), computed from H; None if the output W X is zero."""
        hessian, lost = self.matrix(), after - before
        energy = torch.sum((before @ hessian) * before)
        return (torch.sum((lost @ hessian) * lost) / energy).item() if energy > 0 else None

    @staticmethod
    def num_numbers(cols: int) -> int:
        return cols**2

    def matrix(self) -> Tensor:
        """H (C, C) in fp32. The caller must not change it: it is not a copy."""
        if not self._is_scaled:
            for rows in self._strips():
                self._sum[rows.stop :, rows] = self._sum[rows, rows.stop :].T
            self._sum.mul_(2.0 / self._num_tokens)
            self._is_scaled = True
        return self._sum

    @classmethod
    def total(cls, parts: Sequence[HessianSum]) -> HessianSum:
        """The sum over the tokens of all `parts`."""
        whole = cls(len(parts[0]._sum), parts[0]._sum.device)
        for part in parts:
            assert not part._is_scaled, "the Hessian has been read"
            whole._sum.add_(part._sum)
            whole._num_tokens += part._num_tokens
        return whole

    def complete(self, total: HessianSum, num_tokens: int) -> None:
        """Add mean tokens of `total` until there are `num_tokens`."""
        assert not self._is_scaled, "the Hessian has been read"
        self._sum.add_(total._sum, alpha=(num_tokens - self._num_tokens) / total._num_tokens)
        self._num_tokens = num_tokens

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """The sum and the counts, for a checkpoint."""
        return self._sum, {"num_tokens": self._num_tokens, "is_scaled": int(self._is_scaled)}

    @classmethod
    def restored(cls, matrix: Tensor, counts: Mapping[str, int], device: torch.device) -> HessianSum:
        """Recreate the statistics from `state`, bit for bit."""
        hessian = cls(0, device)
        hessian._sum = matrix.to(device)
        hessian._num_tokens, hessian._is_scaled = counts["num_tokens"], bool(counts["is_scaled"])
        return hessian


class SquareSum:
    """Adds up x^2 per input channel in fp32: the diagonal of x x^T, which is all that Wanda needs."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._sum = torch.zeros(cols, device=device)
        self._num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs `x`, (tokens, C)."""
        self._sum.add_(x.float().square().sum(dim=0))
        self._num_tokens += len(x)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """None: the squares of channels do not determine the error of the output."""
        return None

    @staticmethod
    def num_numbers(cols: int) -> int:
        return cols

    def mean_square(self) -> Tensor:
        """The mean of x^2 per input channel, (C,)."""
        return self._sum / self._num_tokens

    @classmethod
    def total(cls, parts: Sequence[SquareSum]) -> SquareSum:
        """The sum over the tokens of all `parts`."""
        whole = cls(len(parts[0]._sum), parts[0]._sum.device)
        for part in parts:
            whole._sum.add_(part._sum)
            whole._num_tokens += part._num_tokens
        return whole

    def complete(self, total: SquareSum, num_tokens: int) -> None:
        """Add mean tokens of `total` until there are `num_tokens`."""
        self._sum.add_(total._sum, alpha=(num_tokens - self._num_tokens) / total._num_tokens)
        self._num_tokens = num_tokens

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """The sum and the count, for a checkpoint."""
        return self._sum, {"num_tokens": self._num_tokens}

    @classmethod
    def restored(cls, sums: Tensor, counts: Mapping[str, int], device: torch.device) -> SquareSum:
        """Recreate the statistics from `state`, bit for bit."""
        squares = cls(0, device)
        squares._sum, squares._num_tokens = sums.to(device), counts["num_tokens"]
        return squares
