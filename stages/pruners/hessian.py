"""Factorization of the inverse Hessian of a layer's output error, for SparseGPT and ALPS.

H = 2/n sum x x^T over the n calibration tokens; U is upper triangular with U^T U = (H + damping I)^-1.
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
    """Cholesky factor of an inverse Hessian. Layers with the same input share one."""

    upper: Tensor  # U (cols, cols)
    dead: Tensor  # (cols,) bool: input channels that are zero on every token
    damping: float  # the damping with which the factorization succeeded, as a share of the mean diagonal


def factorise(hessian: Tensor, damping: float, on_retry: Callable[[str], None]) -> Factor:
    """The upper Cholesky factor of the inverse of the damped Hessian, in the Hessian's dtype.

    A failed factorization is retried up to three times, each time with ten times the damping.

    Args:
        hessian: (cols, cols); left unchanged.
        damping: Added to the diagonal, as a share of the diagonal's mean.
        on_retry: Receives a message before each retry.

    Raises:
        NumericalError: Every retry failed, or the Hessian is not finite.
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
    """Overwrite the matrix by U^T, where U^T U = matrix^-1. Returns False if it has no factor in this precision.

    In place, because the Hessian of a wide layer may be larger than its block. LAPACK needs contiguous columns and
    copies any other layout.
    """
    work = matrix.T  # the matrix is symmetric: this view has contiguous columns
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if int(failed):
        return False
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
    return not int(failed) and _is_finite(matrix)


def _is_finite(matrix: Tensor) -> bool:
    """Whether the matrix holds no infinity and no NaN. In strips of rows, because torch's test makes two copies."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(1024))
