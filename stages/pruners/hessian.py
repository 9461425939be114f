"""The Hessian of a layer's output error, and the factor of its inverse that SparseGPT works with.

H = 2/n sum x x^T over the n calibration tokens; U upper triangular with U^T U = (H + damping I)^-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import NumericalError

_NUM_RETRIES = 3
_RETRY_FACTOR = 10.0


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
