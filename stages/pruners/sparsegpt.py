"""SparseGPT (Frantar and Alistarh, 2023, Algorithm 1): prune column by column, pass each error on to the right.

R: output rows of a weight.    C: its columns, the input channels.    U: upper factor of the inverse Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.pruners.hessian import Factor
from stages.pruners.selection import smallest


def sparsegpt(
    weight: Tensor, factor: Factor, num_masked: int, *, column_block: int = 128, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """New weights (R, C) and the mask (R, C), True where pruned: exactly `num_masked` of them.

    weight: (R, C), left as it is; computed in the factor's dtype. Each block of `column_block` columns chooses its
    own mask over all rows, by w^2 / U_jj^2 on the weights as updated so far; its count is its share of
    `num_masked`. mask: a mask given from outside, followed instead.
    """
    upper = factor.upper
    work = weight.detach().to(upper.dtype, copy=True)
    work[:, factor.dead] = 0
    num_rows, num_cols = work.shape
    chosen = torch.empty(num_rows, num_cols, dtype=torch.bool, device=work.device)
    for start in range(0, num_cols, column_block):
        stop = min(start + column_block, num_cols)
        corner = upper[start:stop, start:stop]
        pivots = corner.diagonal()
        if mask is None:
            # Rounding down at both ends makes the counts of the blocks add up to num_masked.
            count = num_masked * stop // num_cols - num_masked * start // num_cols
            chosen[:, start:stop] = smallest((work[:, start:stop] / pivots).square(), count)
        else:
            chosen[:, start:stop] = mask[:, start:stop]
        # Transposed, so that a column of weights is contiguous.
        columns = work[:, start:stop].T.contiguous()  # (block, R)
        pruned = chosen[:, start:stop].T.contiguous()
        errors = torch.empty_like(columns)
        for j, pivot in enumerate(pivots.tolist()):
            error = (columns[j] * pruned[j]).div_(pivot)
            columns[j].masked_fill_(pruned[j], 0)
            columns[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
            errors[j] = error
        work[:, start:stop] = columns.T
        work[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return work.to(weight.dtype), chosen
