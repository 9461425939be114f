"""Data-dependent budget: blocks with more outlying weights get a lower sparsity (OWL, Yin et al., 2024).

The sparsity of a block falls linearly with its share of outlying weights, which `stages.allocate` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from stages.sparsity.budget import BlockBudget, BudgetError, LayerShape, allocate

# Offsets that are infeasible for a layer are reduced in this many equal steps.
_STEPS = 10


def budget_by_outliers(
    blocks: Sequence[Sequence[LayerShape]],
    shares: Sequence[float],
    spread: float,
    sparsity: float,
    alpha: float,
    beta: float,
    fixed: Mapping[str, float] | None = None,
) -> tuple[tuple[BlockBudget, ...], float]:
    """Compute the count of every layer from the blocks' shares of outlying weights.

    The sparsity of the block with the largest share is 2 * spread below that of the block with the smallest share.
    Then alpha, beta and `fixed` apply as in `stages.sparsity.budget.allocate`.

    Args:
        blocks: The prunable layers of each block.
        shares: Each block's share of outlying weights.
        spread: Half of the difference between the largest and the smallest sparsity.
        sparsity: Share of masked weights, over all layers that are not in `fixed`.
        alpha: In (0, 1], LAMP Eqs. 1-2.
        beta: At least 0, LAMP Eqs. 3-4.
        fixed: Sparsity by layer name.

    Returns:
        The budget of each block, and the spread used: `spread`, or less if a layer has too few weights for it.

    Raises:
        BudgetError: The budget is infeasible even with a spread of 0.
    """
    sizes = [sum(layer.size for layer in block if layer.name not in (fixed or {})) for block in blocks]
    for step in range(_STEPS, -1, -1):
        used = Fraction(str(spread)) * step / _STEPS
        try:
            offsets = _offsets(shares, sizes, used)
            return allocate(blocks, sparsity, alpha, beta, fixed, offsets), float(used)
        except BudgetError:
            if step == 0:
                raise
    raise AssertionError("a spread of 0 was not tried")


def _offsets(shares: Sequence[float], sizes: Sequence[int], spread: Fraction) -> list[Fraction]:
    """The offset of each block's sparsity; the sum, weighted by the sizes of the blocks, is 0."""
    exact = [Fraction(share) for share in shares]
    low, high = min(exact), max(exact)
    if high == low or not sum(sizes):
        return [Fraction(0)] * len(exact)
    kept = [2 * spread * (share - low) / (high - low) for share in exact]
    mean = sum((k * size for k, size in zip(kept, sizes, strict=True)), Fraction(0)) / sum(sizes)
    return [mean - k for k in kept]
