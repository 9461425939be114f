"""Refine a block that has just been pruned: train the weights it kept, its mask fixed, towards the dense output.

B <- argmin |B(biased_in) - dense_out|^2 over the kept weights, biases and norms. The paper has no such step; it also
serves the last block, whose error no later block can compensate. Where the weights are quantized they stay on their
grid: the forward pass rounds them, the gradient passes straight through the rounding (Bengio et al., 2013).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stages.finish_block import FinishedBlock, PruneOutcome, finish_block
from stages.interfaces import Callbacks, Scratch, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.quantization.grid import Grid
from stages.training.trainer import BlockTrainer, Training, TrainingSettings


@dataclass(frozen=True)
class RefinedBlock:
    """A pruned block in the export dtype, and how its training went."""

    finished: FinishedBlock
    training: Training


def refine_block(
    model: BlockModel,
    block_index: int,
    inputs: Stream,
    biased_in: Stream,
    dense_out: Stream,
    state: Mapping[str, Tensor],
    outcome: PruneOutcome,
    settings: TrainingSettings,
    choices: DeviceChoices,
    callbacks: Callbacks,
    *,
    export_dtypes: Mapping[str, torch.dtype],
    biased_out: Stream | None,
    spill: Scratch | None = None,
) -> RefinedBlock:
    """Train pruned block `block_index`, round it to the export dtype, run the biased stream through the result.

    state: the pruned block in fp32. outcome: masks, grids and the pattern, which hold afterwards as before.
    inputs: token ids of the N samples. biased_in, dense_out, biased_out: N samples (tokens, hidden).
    spill: room for the best weights so far, which otherwise are a second block in memory.
    Raises NumericalError if the loss stops being finite.
    """
    block = model.load_block(block_index, choices.torch_device, state=state)
    outcome = outcome.to(choices.torch_device)
    trainer = BlockTrainer(
        *(model, block, block_index, inputs, biased_in, dense_out, settings, choices, callbacks),
        purpose="refine",
        spill=spill,
        passes_before=1,
        passes_after=1 if biased_out is not None else 0,
    )
    trainer.first_pass()
    with _kept_masked(model, block, block_index, outcome):
        training = trainer.train(list(block.parameters()))
    finished = finish_block(
        *(model, block, block_index, outcome, choices, trainer.advance),
        export_dtypes=export_dtypes,
        inputs=inputs,
        biased=biased_in,
        biased_out=biased_out,
        boundary=trainer.boundary,
    )
    return RefinedBlock(finished, training)


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
