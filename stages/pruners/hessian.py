"""The Hessian of a layer's output error, and the factor of its inverse that SparseGPT works with.

H = 2/n sum x x^T over the n calibration tokens; U upper triangular with U^T U = (H + damping I)^-1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import NumericalError

_NUM_RETRIES = 3
_RETRY_FACTOR = 10.0


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


@dataclass(frozen=True)
class Factor:
    """What SparseGPT needs of a Hessian. Layers with the same input share one."""

    upper: Tensor  # U (cols, cols)
    dead: Tensor  # (cols,) bool: input channels that are zero on every token
    damping: float  # as a share of the mean diagonal: what the factorisation needed in the end


def factorise(hessian: Tensor, damping: float, on_retry: Callable[[str], None]) -> Factor:
    """The upper Cholesky factor of the inverse of the damped Hessian, in its own dtype.

    damping: share of the mean diagonal that is added to the diagonal. Where the matrix has no factor, ten times
    as much is tried, up to three times, and `on_retry` is told.
    Raises NumericalError if that does not help, or if the Hessian is not finite.
    """
    diagonal = hessian.diagonal()
    if not _is_finite(hessian):
        raise NumericalError("the Hessian holds infinities or NaN: the activations overflowed before this layer")
    dead = diagonal == 0
    mean = diagonal.mean()
    share = damping
    for attempt in range(_NUM_RETRIES + 1):
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        damped.diagonal().masked_fill_(dead, 1.0)
        if _to_inverse_factor(damped):
            return Factor(damped.T, dead, share)
        if attempt < _NUM_RETRIES:
            share *= _RETRY_FACTOR
            on_retry(f"the Hessian has no Cholesky factor; trying again with damping {share:g}")
    raise NumericalError(
        f"the Hessian has no Cholesky factor even with damping {share:g}: use more calibration tokens "
        "(--num-samples) or a larger `damping` in the config file"
    )


def _to_inverse_factor(matrix: Tensor) -> bool:
    """Put U^T, with U^T U = matrix^-1, in the matrix's own place; False: in this precision it has no factor.

    In place, since the Hessian of a wide layer may be larger than its block: LAPACK wants its columns contiguous, and
    makes copies of anything else.
    """
    work = matrix.T  # symmetric: the same matrix, column by column
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if int(failed):
        return False
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
    return not int(failed) and _is_finite(matrix)


def _is_finite(matrix: Tensor) -> bool:
    """Whether it holds no infinity and no NaN; by strips, since torch's test takes two copies of what it looks at."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(1024))
