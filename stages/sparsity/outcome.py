"""What a pruned block promises, and the check that it keeps it.

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
    """What pruning did to one layer, as (rows, cols)."""

    mask: Tensor  # (R, C) bool, True where pruned
    grid: Grid | None
    relative_error: float | None = None  # |W x - W' x|^2 / |W x|^2 over the calibration set; None without a Hessian
    damping: float | None = None  # what the factorisation needed in the end

    def to(self, device: torch.device) -> LayerOutcome:
        """The same in another device's memory."""
        grid = self.grid
        if grid is not None:
            grid = replace(grid, scale=grid.scale.to(device), zero=grid.zero.to(device))
        return replace(self, mask=self.mask.to(device), grid=grid)


@dataclass(frozen=True)
class PruneOutcome:
    """What pruning did to a block, by layer name, in the order of the module."""

    layers: Mapping[str, LayerOutcome]
    pattern: Pattern | None

    def to(self, device: torch.device) -> PruneOutcome:
        """The same in another device's memory."""
        return replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()})


@dataclass(frozen=True)
class PrunedLayer:
    """What one layer of the exported block is like, counted on the weights as exported."""

    name: str
    num_masked: int
    num_other_zeros: int  # zeros that nobody asked for: dead columns, rounding, zeros of the original
    num_levels: int | None  # most distinct values in a row (or group of columns); None: not quantized
    relative_error: float | None
    damping: float | None


def require_budget(outcome: PruneOutcome, budget: BlockBudget) -> None:
    """Make sure that each layer's mask holds its budget to the last weight: a matter of ours, not of the user's."""
    for layer in budget.layers:
        found = int(outcome.layers[layer.name].mask.sum())
        if found != layer.num_masked:
            raise AssertionError(f"{layer.name}: the mask holds {found} weights, its budget is {layer.num_masked}")


def check_layer(name: str, weight: Tensor, layer: LayerOutcome, pattern: Pattern | None) -> PrunedLayer:
    """The figures of a layer, counted on its weight (R, C) as exported.

    Raises AssertionError where a promise is broken, which is an error of ours: a masked weight that is not zero, a
    group that breaks the pattern, a row with more values than its bits allow.
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
