"""Outcome of pruning: the mask and grid of each layer, and the checks that a pruned block must pass.

R: output rows of a weight.    C: its columns, the input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.quantization.grid import Grid, most_levels
from stages.sparsity.budget import BlockBudget
from stages.sparsity.nm_pattern import Pattern


@dataclass(frozen=True)
class LayerOutcome:
    """The outcome of pruning one layer."""

    mask: Tensor  # (R, C) bool, True where pruned
    grid: Grid | None  # None: not quantized
    relative_error: float | None = None  # |W x - W' x|^2 / |W x|^2 over the calibration set; None without a Hessian
    damping: float | None = None  # the damping with which the factorization succeeded; None: no factorization

    def to(self, device: torch.device) -> LayerOutcome:
        """The same in another device's memory."""
        grid = self.grid
        if grid is not None:
            grid = replace(grid, scale=grid.scale.to(device), zero=grid.zero.to(device))
        return replace(self, mask=self.mask.to(device), grid=grid)


@dataclass(frozen=True)
class PruneOutcome:
    """The outcome of pruning a block, by layer name, in the order of the module."""

    layers: Mapping[str, LayerOutcome]
    pattern: Pattern | None

    def to(self, device: torch.device) -> PruneOutcome:
        """The same in another device's memory."""
        return replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()})


@dataclass(frozen=True)
class PrunedLayer:
    """Counts and errors of one layer of a finished block, counted on the weights as exported."""

    name: str
    num_masked: int
    num_other_zeros: int  # zeros outside the mask: dead columns, rounding, zeros of the original
    num_levels: int | None  # most distinct values in a row (or group of columns); None: not quantized
    relative_error: float | None
    damping: float | None


def require_budget(outcome: PruneOutcome, budget: BlockBudget) -> None:
    """Check that each layer's mask has exactly the budget's count. Raises AssertionError, which is a bug of lampctl."""
    for layer in budget.layers:
        found = int(outcome.layers[layer.name].mask.sum())
        if found != layer.num_masked:
            raise AssertionError(f"{layer.name}: the mask holds {found} weights, its budget is {layer.num_masked}")


def check_layer(name: str, weight: Tensor, layer: LayerOutcome, pattern: Pattern | None) -> PrunedLayer:
    """Check one layer as exported, and count its zeros and levels.

    Args:
        name: Of the layer, for messages.
        weight: (R, C), in the export dtype.
        layer: The mask and grid that the weight must keep.
        pattern: The N:M pattern that the weight must keep; None: there is none.

    Raises:
        AssertionError: A masked weight is not zero, a group breaks the pattern, or a row has more distinct values than
            its bits allow: a bug of lampctl.
        NumericalError: A weight is not on its quantization grid.
    """
    zeros = weight == 0
    if bool((layer.mask & ~zeros).any()):
        raise AssertionError(f"{name}: a masked weight is not zero")
    if pattern is not None and pattern.share_held(zeros) != 1:
        raise AssertionError(f"{name}: {pattern.share_held(zeros):.4%} of the groups hold {pattern}")
    num_levels = None
    if layer.grid is not None:
        layer.grid.codes_of_stored(weight)  # raises where a weight is off its grid
        num_levels = most_levels(weight, layer.grid.group_size)
        if num_levels > layer.grid.num_levels:
            raise AssertionError(f"{name}: {num_levels} distinct values in a row of {layer.grid.bits} bits")
    num_masked = int(layer.mask.sum())
    return PrunedLayer(name, num_masked, int(zeros.sum()) - num_masked, num_levels, layer.relative_error, layer.damping)
