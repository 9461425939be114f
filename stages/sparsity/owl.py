"""A budget that follows the data: blocks with more outlying weights lose less (OWL, Yin et al., 2024).

The blocks' shares of outlying weights (`stages.allocate`) are spread over an interval of sparsities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from stages.sparsity.budget import BlockBudget, BudgetError, LayerShape, allocate

# Offsets that are too large for a layer are reduced in this many equal steps.
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
    """The count of every layer, and the spread that was used: `spread`, or less where a layer has not so many weights.

    shares: of outlying weights, one a block. The block with the most of them loses 2 * spread less of its weights than
    the one with the fewest, the others lie between; then alpha, beta and `fixed` act as in `allocate`.
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
    """What to add to each block's sparsity; over all weights it adds up to nothing."""
    exact = [Fraction(share) for share in shares]
    low, high = min(exact), max(exact)
    if high == low or not sum(sizes):
        return [Fraction(0)] * len(exact)
    kept = [2 * spread * (share - low) / (high - low) for share in exact]
    mean = sum((k * size for k, size in zip(kept, sizes, strict=True)), Fraction(0)) / sum(sizes)
    return [mean - k for k in kept]
