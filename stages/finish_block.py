"""Finish a pruned block: round it to the export dtype, check it, and propagate the biased stream through it.

The weights are rounded BEFORE the stream is propagated, so that later blocks see the outputs of the exported model.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.interfaces import Samples
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.sparsity.outcome import PrunedLayer, PruneOutcome, check_layer


@dataclass(frozen=True)
class FinishedBlock:
    """A block's state in the export dtype, and the counts of each layer."""

    state: dict[str, Tensor]
    layers: tuple[PrunedLayer, ...]


class Progress(Protocol):
    """Progress of a stage over the samples."""

    def boundary(self) -> None:
        """Stop here if requested; a stage may keep a checkpoint. Called before each micro-batch."""
        ...

    def advance(self, count: int = 1, /) -> None:
        """Report that `count` more samples are done."""
        ...


@torch.no_grad()
def finish_block(
    context: BlockContext,
    block: nn.Module,
    outcome: PruneOutcome,
    biased: Samples | None,
    output: BlockOutput,
    progress: Progress,
) -> FinishedBlock:
    """Round the block in place, check it, and write its outputs to the output stream if there is one.

    Args:
        context: The block and its samples.
        block: Pruned, fp32, on the device. It is empty afterwards: its weights are in the result.
        outcome: Pruning masks and quantization grids of its layers.
        biased: The block's input of each of N samples, (T, H); None only without an output stream.
        output: The export dtypes and the output stream.
        progress: Receives the progress over the samples.

    Raises:
        NumericalError: A weight is NaN or infinite.
        AssertionError: A check of the pruned block fails, which is a bug of lampctl.
    """
    model = context.model
    infos = [info for info in model.layers(context.index) if info.name in outcome.layers]
    for info in infos:  # a pruned weight is +0.0, never -0.0
        module = block.get_submodule(info.path)
        model.set_weight_matrix(module, model.weight_matrix(module).masked_fill(outcome.layers[info.name].mask, 0))
    broken = next((name for name, tensor in block.state_dict().items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise NumericalError(f"{context.name}: {broken} holds NaN or infinity after training or pruning")
    dtypes = output.dtypes
    for name, tensor in block.state_dict().items():
        tensor.copy_(tensor.to(dtypes[name]))
    layers = tuple(
        check_layer(
            info.name,
            model.weight_matrix(block.get_submodule(info.path)).to(dtypes[f"{info.path}.weight"]),
            outcome.layers[info.name],
            outcome.pattern,
        )
        for info in infos
    )
    if output.stream is not None:
        assert biased is not None
        context.runner(block).propagate(biased, output.stream, progress.boundary, progress.advance)
    return FinishedBlock(_taken(block, dtypes), layers)


def _taken(block: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The block's state in the export dtypes, on the CPU. Frees each tensor once it is converted: never two blocks."""
    state, taken = block.state_dict(), dict[str, Tensor]()
    held = {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
    for name in [*state]:
        taken[name] = state.pop(name).to("cpu", dtypes[name])
        if name in held:
            held[name].data = held[name].data.new_empty(0)
    return taken
