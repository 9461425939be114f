"""Refine a pruned block: train its kept weights towards the dense output, with its pruning mask fixed.

B <- argmin |B(biased_in) - dense_out|^2 over the kept weights, biases and norms. The paper has no such step. It also
improves the last block, whose error no later block can compensate. Quantized weights stay on their quantization grid.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Samples, Scratch, Stream
from stages.prune_block import PrunedBlock
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.training.kept_weights import kept_masked
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
    purpose = Purpose("refine", passes_before=0, passes_after=1 if output.stream is not None else 0)
    trainer = BlockTrainer(context, block, biased_in, dense_out, settings, purpose, spill)
    trainer.first_pass()
    with kept_masked(context.model, block, context.index, outcome):
        training = trainer.train(list(block.parameters()))
    return RefinedBlock(finish_block(context, block, outcome, biased_in, output, trainer), training)
