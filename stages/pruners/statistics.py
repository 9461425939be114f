"""Sums over the inputs of layers, which pruners choose and solve by. Each distinct input of a block has one.

Source: SparseGPT (Frantar and Alistarh, 2023) for H = 2/n sum x x^T; Wanda (Sun et al., 2023) for the squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

# A symmetric sum is added up in strips, each from its diagonal on: little more than half of the products. Of so many
# columns at least, since narrow products are slow, and so many at most, since each is a call.
_NARROWEST_STRIP, _MOST_STRIPS = 96, 8


class HessianSum:
    """Adds up x x^T over tokens, in fp32. Once it has been read, nothing can be added.

    Only the upper triangle is kept up to date, in strips; reading it fills in the rest.
    """

    def __init__(self, cols: int, device: torch.device) -> None:
        self._sum = torch.zeros(cols, cols, device=device)
        self._num_tokens = 0
        self._is_scaled = False

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (tokens, cols)."""
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
        """|(W - W') X|^2 / |W X|^2 of weights (rows, cols), from H alone; None for weights that give nothing."""
        hessian, lost = self.matrix(), after - before
        energy = torch.sum((before @ hessian) * before)
        return (torch.sum((lost @ hessian) * lost) / energy).item() if energy > 0 else None

    @staticmethod
    def num_numbers(cols: int) -> int:
        return cols**2

    def matrix(self) -> Tensor:
        """H (cols, cols), fp32: the object's own memory, not to be changed."""
        if not self._is_scaled:
            for rows in self._strips():
                self._sum[rows.stop :, rows] = self._sum[rows, rows.stop :].T
            self._sum.mul_(2.0 / self._num_tokens)
            self._is_scaled = True
        return self._sum

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """What `restored` needs: the sum as it is, and the counts."""
        return self._sum, {"num_tokens": self._num_tokens, "is_scaled": int(self._is_scaled)}

    @classmethod
    def restored(cls, matrix: Tensor, counts: Mapping[str, int], device: torch.device) -> HessianSum:
        """The sum that had this `state`."""
        hessian = cls(0, device)
        hessian._sum = matrix.to(device)
        hessian._num_tokens, hessian._is_scaled = counts["num_tokens"], bool(counts["is_scaled"])
        return hessian


class SquareSum:
    """Adds up x^2 per input channel, in fp32: of a Hessian, the diagonal, which is all that Wanda asks for."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._sum = torch.zeros(cols, device=device)
        self._num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (tokens, cols)."""
        self._sum.add_(x.float().square().sum(dim=0))
        self._num_tokens += len(x)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """None: squares of channels do not tell the error of a product."""
        return None

    @staticmethod
    def num_numbers(cols: int) -> int:
        return cols

    def mean_square(self) -> Tensor:
        """The mean of x^2 per input channel, (cols,)."""
        return self._sum / self._num_tokens

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """What `restored` needs."""
        return self._sum, {"num_tokens": self._num_tokens}

    @classmethod
    def restored(cls, sums: Tensor, counts: Mapping[str, int], device: torch.device) -> SquareSum:
        """The sum that had this `state`."""
        squares = cls(0, device)
        squares._sum, squares._num_tokens = sums.to(device), counts["num_tokens"]
        return squares
