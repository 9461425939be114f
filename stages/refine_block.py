"""Refine a pruned block: train its kept weights towards the dense output, with its pruning mask fixed.

B <- argmin |B(biased_in) - dense_out|^2 over the kept weights, biases and norms. The paper has no such step. It also
improves the last block, whose error no later block can compensate. Quantized weights stay on their quantization grid:
the forward pass rounds them, and the gradient ignores the rounding (straight-through estimator, Bengio et al., 2013).

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Samples, Scratch, Stream
from stages.models.base import BlockModel
from stages.prune_block import PrunedBlock
from stages.quantization.grid import Grid
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.sparsity.outcome import PruneOutcome
from stages.training.trainer import BlockTrainer, Purpose, Training, TrainingSettings


@dataclass(frozen=True)
class RefinedBlock:
    """A pruned block in the export dtype, and the training report."""

    finished: FinishedBlock
    training: Training


def refine_block(
    context: BlockContext,
    pruned: PrunedBlock,
    biased_in: Samples,
    dense_out: Stream,
    settings: TrainingSettings,
    output: BlockOutput,
    spill: Scratch | None = None,
) -> RefinedBlock:
    """Train a pruned block, round it to the export dtype, propagate the biased stream through the result.

    Args:
        context: The block and its N samples.
        pruned: The pruned, unfinished block: its state in fp32, and its masks, grids and pattern, which training keeps.
        biased_in: The block's input through the pruned blocks, N samples (T, H).
        dense_out: The target: the original block's output through the original blocks, N samples (T, H).
        settings: How to train.
        output: The export dtypes and the output stream.
        spill: Scratch space for the best weights so far; None: they stay in memory as a second copy of the block.

    Raises:
        NumericalError: The loss is not finite.
    """
    assert pruned.state is not None, "the block is finished already"
    block = context.load(pruned.state)
    outcome = pruned.outcome.to(context.device.torch_device)
    purpose = Purpose("refine", passes_before=1, passes_after=1 if output.stream is not None else 0)
    trainer = BlockTrainer(context, block, biased_in, dense_out, settings, purpose, spill)
    trainer.first_pass()
    with _kept_masked(context.model, block, context.index, outcome):
        training = trainer.train(list(block.parameters()))
    return RefinedBlock(finish_block(context, block, outcome, biased_in, output, trainer), training)


@contextlib.contextmanager
def _kept_masked(model: BlockModel, block: nn.Module, block_index: int, outcome: PruneOutcome) -> Iterator[None]:
    """Context in which training keeps masked weights at zero, and quantized layers compute with weights on their grid.

    Without a grid, the gradient of masked weights is zeroed: then Adam's moments and steps of them are zero, too. With
    a grid, the layer computes with a rounded copy of the weight that is trained.
    """
    infos = {info.name: info for info in model.layers(block_index) if info.name in outcome.layers}
    handles, rounded = [], []
    for name, info in infos.items():
        module, layer = block.get_submodule(info.path), outcome.layers[name]
        mask = layer.mask.T if info.transposed else layer.mask
        with torch.no_grad():
            module.weight.masked_fill_(mask, 0)  # type: ignore[operator]
        if layer.grid is None:
            parameter: nn.Parameter = module.weight  # type: ignore[assignment]
            handles.append(_without_gradient(parameter, mask))
        else:
            parametrize.register_parametrization(module, "weight", _OnGrid(layer.mask, layer.grid, info.transposed))
            rounded.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in rounded:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _without_gradient(parameter: nn.Parameter, mask: Tensor) -> Any:
    """Register a hook that zeroes the parameter's gradient under the mask. Returns the handle that removes it."""

    def zero(changed: Tensor) -> None:
        assert changed.grad is not None
        changed.grad.masked_fill_(mask, 0)

    parameter.requires_grad_(True)
    return parameter.register_post_accumulate_grad_hook(zero)


class _OnGrid(nn.Module):
    """Parametrization of a quantized layer: kept weights rounded to the grid, masked weights zero."""

    def __init__(self, mask: Tensor, grid: Grid, transposed: bool) -> None:
        super().__init__()
        self._mask, self._grid, self._transposed = mask, grid, transposed

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.T if self._transposed else weight
        matrix = _Rounded.apply(matrix, self._grid).masked_fill(self._mask, 0)
        return matrix.T if self._transposed else matrix


class _Rounded(torch.autograd.Function):
    """Round to the nearest values of a grid; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, grid: Grid) -> Tensor:
        return grid.nearest(matrix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
