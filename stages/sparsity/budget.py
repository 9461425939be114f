"""Sparsity budget: how many weights of each layer are pruned (LAMP Eqs. 1-4), in exact whole numbers.

The paper's equations count the blocks from 1, so that n is the last of n blocks. The code counts from 0.

theta_i: prunable weights of block i.    s: global sparsity.    P_i: masked weights of block i.

    P_n = s |theta_n| alpha                                   Eq. 1: the last block's error is never compensated
    P_i = s |theta_i| + s |theta_n| (1 - alpha) / (n - 1)     Eq. 2, i < n
    q, k, v: (P_i / |theta_i|) |W| (1 - beta)                 Eq. 3; fc2 gets the same count in addition (Eq. 4)

A data-dependent budget (`stages.sparsity.owl`) uses s + d_i in place of s, with an offset d_i per block. All numbers
are exact fractions. The largest remainder method rounds: first among blocks, then among the layers of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from stages.errors import UsageError
from stages.sparsity.nm_pattern import Pattern

_GIVES = ("q", "k", "v", "qkv")
_TAKES = "fc2"
# Feasible values of alpha and beta are rounded to the safe side, to multiples of 1 / _STEP.
_STEP = 10_000


class BudgetError(UsageError):
    """A layer would lose more weights than it has, or a setting does not apply to these layers."""


@dataclass(frozen=True)
class LayerShape:
    """A layer that may be pruned."""

    name: str
    role: str | None  # "q", "k", "v", "qkv", "out", "fc1", "gate", "up", "fc2", ... ; None: unknown
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True)
class LayerBudget:
    """How many of a layer's weights are masked."""

    name: str
    role: str | None
    size: int
    num_masked: int


@dataclass(frozen=True)
class BlockBudget:
    """The budgets of the prunable layers of one block."""

    layers: tuple[LayerBudget, ...]

    @property
    def size(self) -> int:
        """Prunable weights of the block."""
        return sum(layer.size for layer in self.layers)

    @property
    def num_masked(self) -> int:
        """Masked weights of the block."""
        return sum(layer.num_masked for layer in self.layers)


def allocate(
    blocks: Sequence[Sequence[LayerShape]],
    sparsity: float,
    alpha: float,
    beta: float,
    fixed: Mapping[str, float] | None = None,
    offsets: Sequence[Fraction] | None = None,
) -> tuple[BlockBudget, ...]:
    """Compute the count of every layer. The counts add up to round(sparsity * weights) exactly.

    Args:
        blocks: The prunable layers of each block.
        sparsity: Share of masked weights, over all layers that are not in `fixed`.
        alpha: In (0, 1], LAMP Eqs. 1-2.
        beta: At least 0, LAMP Eqs. 3-4.
        fixed: Sparsity by layer name. `sparsity`, alpha and beta apply to the other layers.
        offsets: Added to each block's sparsity; their sum, weighted by the sizes of the blocks, is 0.

    Raises:
        BudgetError: A layer would lose more weights than it has, or a block lacks the roles that beta needs.
    """
    fixed = fixed or {}
    free = [[layer for layer in block if layer.name not in fixed] for block in blocks]
    sparsities = _block_sparsities(free, _exact(sparsity), _exact(alpha), offsets)
    targets = []
    for index, (block, block_sparsity) in enumerate(zip(free, sparsities, strict=True)):
        factors = _factors(block, _exact(beta), index)
        targets.append([block_sparsity * layer.size * f for layer, f in zip(block, factors, strict=True)])
        _require_feasible(index, block, targets[-1], alpha, beta)
    total = round(_exact(sparsity) * sum(layer.size for block in free for layer in block))
    block_counts = _largest_remainder([sum(t, Fraction(0)) for t in targets], total)
    budgets = []
    for every, free_block, wanted, count in zip(blocks, free, targets, block_counts, strict=True):
        counts = dict(zip((layer.name for layer in free_block), _largest_remainder(wanted, count), strict=True))
        for layer in every:
            if layer.name in fixed:
                counts[layer.name] = round(_exact(fixed[layer.name]) * layer.size)
        budgets.append(BlockBudget(tuple(LayerBudget(x.name, x.role, x.size, counts[x.name]) for x in every)))
    return tuple(budgets)


def follow_pattern(blocks: Sequence[Sequence[LayerShape]], pattern: Pattern) -> tuple[BlockBudget, ...]:
    """The counts of an N:M pattern, which masks N of every M weights of every layer.

    Raises:
        BudgetError: M does not divide the columns of a layer.
    """
    unfit = [layer for block in blocks for layer in block if layer.cols % pattern.group]
    if unfit:
        first = unfit[0]
        kinds = sorted({layer.name.rpartition(".")[2] for layer in unfit})
        which = "|".join(map(re.escape, kinds))
        which = which if len(kinds) == 1 else f"({which})"
        others = f" (and {len(unfit) - 1} other layers: {', '.join(kinds)})" if len(unfit) > 1 else ""
        raise BudgetError(
            f"--pattern {pattern}: {first.name} has {first.cols} columns, no multiple of {pattern.group}{others}; "
            f"leave such layers dense with --ignore '{which}$' or use another pattern"
        )
    return tuple(
        BlockBudget(tuple(LayerBudget(x.name, x.role, x.size, pattern.count(x.size)) for x in block))
        for block in blocks
    )


def feasible_alpha(blocks: Sequence[Sequence[LayerShape]], sparsity: float, alpha: float, beta: float) -> float:
    """`alpha`, or the smallest value above it at which no layer of the other blocks exceeds 100%."""
    sizes = [_size(block) for block in blocks]
    num_takers = sum(size > 0 for size in sizes[:-1])
    lowest, s = _exact(alpha), _exact(sparsity)
    if num_takers == 0 or sizes[-1] == 0:
        return alpha
    for index, block in enumerate(blocks[:-1]):
        if block:
            room = 1 / max(_factors(block, _exact(beta), index)) - s
            lowest = max(lowest, 1 - room * num_takers * sizes[index] / (s * sizes[-1]))
    if lowest == _exact(alpha):
        return alpha
    return min(1.0, math.ceil(lowest * _STEP) / _STEP)


def feasible_beta(blocks: Sequence[Sequence[LayerShape]], sparsity: float, alpha: float, beta: float) -> float:
    """`beta`, or the largest value below it at which no fc2 exceeds 100%; 0 if the roles are unknown."""
    highest = _exact(beta)
    for block, s in zip(blocks, _block_sparsities(blocks, _exact(sparsity), _exact(alpha)), strict=True):
        gives, takes = _exchange(block)
        if block and not (gives and takes):
            return 0.0
        if block:
            highest = min(highest, max(Fraction(0), 1 / s - 1) * takes / gives)
    return beta if highest == _exact(beta) else math.floor(highest * _STEP) / _STEP


def _exact(value: float) -> Fraction:
    """The decimal number that the user wrote, not its binary approximation."""
    return Fraction(str(value))


def _size(block: Sequence[LayerShape]) -> int:
    return sum(layer.size for layer in block)


def _block_sparsities(
    blocks: Sequence[Sequence[LayerShape]], s: Fraction, alpha: Fraction, offsets: Sequence[Fraction] | None = None
) -> list[Fraction]:
    """P_i / |theta_i| for every block. A block without prunable layers gets no share."""
    sizes = [_size(block) for block in blocks]
    num_takers = sum(size > 0 for size in sizes[:-1])
    if num_takers == 0:
        alpha = Fraction(1)
    wanted = [s + offset for offset in offsets] if offsets is not None else [s] * len(sizes)
    share = wanted[-1] * sizes[-1] * (1 - alpha) / max(num_takers, 1)
    others = [w + share / size if size else w for w, size in zip(wanted[:-1], sizes[:-1], strict=True)]
    return [*others, wanted[-1] * alpha]


def _exchange(block: Sequence[LayerShape]) -> tuple[int, int]:
    """Numbers of weights in q, k, v, whose counts beta reduces, and in fc2, whose count it raises."""
    gives = sum(layer.size for layer in block if layer.role in _GIVES)
    return gives, sum(layer.size for layer in block if layer.role == _TAKES)


def _factors(block: Sequence[LayerShape], beta: Fraction, index: int) -> list[Fraction]:
    """Each layer's sparsity divided by its block's."""
    if beta == 0 or not block:
        return [Fraction(1)] * len(block)
    gives, takes = _exchange(block)
    if not gives or not takes:
        known = ", ".join(sorted({layer.role for layer in block if layer.role})) or "none"
        raise BudgetError(
            f"--beta {float(beta):g} moves weights from q, k, v to fc2, and block {index} has no such pair "
            f"(known roles of its prunable layers: {known}); use --beta 0"
        )
    by_role = dict.fromkeys(_GIVES, 1 - beta) | {_TAKES: 1 + beta * gives / takes}
    return [by_role.get(layer.role or "", Fraction(1)) for layer in block]


def _require_feasible(
    index: int, block: Sequence[LayerShape], targets: Sequence[Fraction], alpha: float, beta: float
) -> None:
    for layer, target in zip(block, targets, strict=True):
        if not 0 <= target <= layer.size:
            remedies = ["a larger alpha"] * (alpha < 1) + ["a smaller beta"] * (beta > 0) + ["less --sparsity"]
            raise BudgetError(
                f"block {index} would have to lose {float(100 * target / layer.size):.2f}% of {layer.name} "
                f"with --alpha {alpha:g} --beta {beta:g}: use {' or '.join(remedies)}"
            )


def _largest_remainder(targets: Sequence[Fraction], total: int) -> list[int]:
    """Round targets to whole numbers that add up to `total`, each within 1 of its target; ties go to the first."""
    counts = [math.floor(target) for target in targets]
    order = sorted(range(len(targets)), key=lambda i: (counts[i] - targets[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    assert sum(counts) == total
    return counts
