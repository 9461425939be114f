"""SparseGPT (Frantar and Alistarh, 2023, Algorithm 1): prune column by column, and compensate in later columns.

R: output rows of a weight.    C: its columns, the input channels.    U: upper factor of the inverse Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.pruners.base import LayerProblem, PrunedMatrix, Pruner, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from stages.pruners.hessian import Factor
    from stages.quantization.grid import Grid
    from stages.sparsity.nm_pattern import Pattern


class SparseGPT(Pruner):
    """Prunes and, with bits, quantizes in one sweep over the columns, by the Hessian of the layer's output error."""

    name = "sparsegpt"
    title = "SparseGPT"
    help = "Prune column by column; later columns compensate the error of earlier ones."
    quantizes_jointly = True
    serves_lamp = True
    num_weight_copies = 5

    @classmethod
    def statistics(cls) -> type[Statistics]:
        from stages.pruners.statistics import HessianSum

        return HessianSum

    @classmethod
    def num_matrices(cls, *, is_shared: bool) -> int:
        return 1  # the factor

    def prepare(self, statistics: Any, *, is_shared: bool, warn: Callable[[str], None]) -> Factor:
        """Factorize the Hessian. statistics: a `HessianSum`. Raises NumericalError if there is no factor."""
        from stages.pruners.hessian import factorise

        return factorise(statistics.matrix(), self.options.damping, on_retry=warn)

    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer by its `Factor`."""
        weight, mask = sparsegpt(
            layer.weight,
            prepared,
            layer.num_masked,
            pattern=self.options.pattern,
            grid=layer.grid,
            column_block=self.options.column_block,
        )
        return PrunedMatrix(weight, mask, prepared.damping)


def sparsegpt(
    weight: Tensor,
    factor: Factor,
    num_masked: int,
    *,
    pattern: Pattern | None = None,
    grid: Grid | None = None,
    column_block: int = 128,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune a weight to exactly `num_masked` zeros, and update the kept weights.

    Each block of `column_block` columns chooses its mask over all rows, by w^2 / U_jj^2 on the weights as updated so
    far; its count is its share of `num_masked`.

    Args:
        weight: (R, C), left unchanged. The computation uses the factor's dtype.
        factor: Of the inverse Hessian.
        num_masked: How many weights are pruned; with a pattern, the pattern's count.
        pattern: N:M: in every row, each group of M columns chooses its mask when the sweep reaches it.
        grid: Quantize the kept weights in the same sweep, so that later columns compensate both errors together.
        column_block: Columns that choose their mask together.
        mask: (R, C) bool, a given mask that replaces the choice.

    Returns:
        The new weights (R, C), in the dtype of `weight`, and the mask (R, C), True where pruned.
    """
    import torch

    from stages.sparsity.topk import smallest

    upper = factor.upper
    work = weight.detach().to(upper.dtype, copy=True)
    work[:, factor.dead] = 0
    num_rows, num_cols = work.shape
    chosen = torch.empty(num_rows, num_cols, dtype=torch.bool, device=work.device)
    if mask is not None:
        pattern = None
    if pattern is not None:  # a group is never split between two blocks
        column_block = max(column_block // pattern.group, 1) * pattern.group
    for start in range(0, num_cols, column_block):
        stop = min(start + column_block, num_cols)
        corner = upper[start:stop, start:stop]
        pivots = corner.diagonal()
        if mask is not None:
            chosen[:, start:stop] = mask[:, start:stop]
        elif pattern is None:
            # Rounding down at both ends makes the counts of the blocks add up to num_masked.
            count = num_masked * stop // num_cols - num_masked * start // num_cols
            chosen[:, start:stop] = smallest((work[:, start:stop] / pivots).square(), count)
        # Transposed, so that a column of weights is contiguous.
        columns = work[:, start:stop].T.contiguous()  # (block, R)
        pruned = chosen[:, start:stop].T.contiguous()
        errors = torch.empty_like(columns)
        # All views at once: creating them column by column costs several calls per column.
        each = zip(pivots.tolist(), columns.unbind(), pruned.unbind(), errors.unbind(), strict=True)
        for j, (pivot, column, is_pruned, error) in enumerate(each):
            if pattern is not None and j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                pruned[group] = pattern.mask((columns[group].T / pivots[group]).square()).T
            if grid is None:
                torch.mul(column, is_pruned, out=error).div_(pivot)
                column.masked_fill_(is_pruned, 0)
            else:
                kept = _quantized(column, grid, start + j).masked_fill_(is_pruned, 0)
                torch.sub(column, kept, out=error).div_(pivot)
                column.copy_(kept)
            columns[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        work[:, start:stop] = columns.T
        chosen[:, start:stop] = pruned.T
        work[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return work.to(weight.dtype), chosen


def _quantized(column: Tensor, grid: Grid, index: int) -> Tensor:
    """The grid values nearest to column `index` (R,)."""
    from stages.quantization.grid import decode, encode

    scale, zero = (part[:, 0].to(column.dtype) for part in grid.columns(index, index + 1))
    return decode(encode(column, scale, zero, grid.num_levels), scale, zero)
