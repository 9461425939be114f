"""Refine a block that has just been pruned: train the weights it kept, its mask fixed, towards the dense output.

B <- argmin |B(biased_in) - dense_out|^2 over the kept weights, biases and norms. The paper has no such step; it also
serves the last block, whose error no later block can compensate. Where the weights are quantized they stay on their
grid: the forward pass rounds them, the gradient passes straight through the rounding (Bengio et al., 2013).
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
    """A pruned block in the export dtype, and how its training went."""

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
        pruned: The pruned, unfinished block: its state in fp32, and masks, grids and pattern, which hold afterwards.
        biased_in: The block's input through the pruned blocks, N samples (T, H).
        dense_out: The target: the original block's output through the original blocks, N samples (T, H).
        settings: How to train.
        output: How the block is exported, and where its outputs go.
        spill: Scratch space for the best weights so far, which otherwise are a second block in memory.

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
    """Inside, training leaves masked weights at zero, and the layers compute with weights on their grids.

    Without a grid it is enough that a masked weight gets no gradient: it is zero, Adam's moments of it stay zero, and
    so does its step. With one, the layer computes with a rounded weight, beside the one that is trained.
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
    """Have the gradient of a parameter zeroed under the mask whenever it is made; `remove` ends it."""

    def zero(changed: Tensor) -> None:
        assert changed.grad is not None
        changed.grad.masked_fill_(mask, 0)

    parameter.requires_grad_(True)
    return parameter.register_post_accumulate_grad_hook(zero)


class _OnGrid(nn.Module):
    """What a quantized layer computes with: its weights rounded to the grid where they were kept, else zero."""

    def __init__(self, mask: Tensor, grid: Grid, transposed: bool) -> None:
        super().__init__()
        self._mask, self._grid, self._transposed = mask, grid, transposed

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.T if self._transposed else weight
        matrix = _Rounded.apply(matrix, self._grid).masked_fill(self._mask, 0)
        return matrix.T if self._transposed else matrix


class _Rounded(torch.autograd.Function):
    """The nearest values of a grid; the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, grid: Grid) -> Tensor:
        return grid.nearest(matrix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
