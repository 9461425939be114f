"""The end of every block: round it to the export dtype, check what was promised of it, run the biased stream on.

The weights are rounded BEFORE the stream goes through them, so that later blocks see what the user's model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.interfaces import Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.quantization.grid import Grid, most_levels
from stages.runtime.block_runner import BlockPass
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


@dataclass(frozen=True)
class FinishedBlock:
    """A block's state in the export dtype, and what each layer is like."""

    state: dict[str, Tensor]
    layers: tuple[PrunedLayer, ...]


@torch.no_grad()
def finish_block(
    model: BlockModel,
    block: nn.Module,
    block_index: int,
    outcome: PruneOutcome,
    choices: DeviceChoices,
    advance: Callable[[int], None],
    *,
    export_dtypes: Mapping[str, torch.dtype],
    inputs: Stream | None,
    biased: Stream | None,
    biased_out: Stream | None,
    boundary: Callable[[], None],
) -> FinishedBlock:
    """Round the block in place, check it, and fill `biased_out` if there is one.

    export_dtypes: dtype of each entry of the block's state in the exported model.
    inputs: token ids of the N samples; biased, biased_out: N samples (tokens, hidden).
    boundary: called before each micro-batch. advance: told how many samples have passed.
    """
    infos = [info for info in model.layers(block_index) if info.name in outcome.layers]
    for info in infos:  # -0.0 is no pruned weight's value
        module = block.get_submodule(info.path)
        model.set_weight_matrix(module, model.weight_matrix(module).masked_fill(outcome.layers[info.name].mask, 0))
    broken = next((name for name, tensor in block.state_dict().items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise NumericalError(f"block {block_index}: {broken} holds NaN or infinity after training or pruning")
    rounded = {name: tensor.to("cpu", export_dtypes[name], copy=True) for name, tensor in block.state_dict().items()}
    for name, tensor in block.state_dict().items():
        tensor.copy_(rounded[name])
    layers = tuple(
        check_layer(
            info.name,
            model.weight_matrix(block.get_submodule(info.path)).to(export_dtypes[f"{info.path}.weight"]),
            outcome.layers[info.name],
            outcome.pattern,
        )
        for info in infos
    )
    if biased_out is not None:
        assert inputs is not None
        assert biased is not None
        BlockPass(model, block, block_index, inputs, choices).propagate(biased, biased_out, boundary, advance)
    return FinishedBlock(rounded, layers)


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
