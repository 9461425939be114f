"""Lines 6-8 of the paper's Algorithm 1: train the next, still dense block to compensate the pruning error.

dense_out = B_original(dense_in)                      line 7
B <- argmin |B(biased_in) - dense_out|^2              line 8, LAMP Eq. 9, by Adam over all of B's parameters

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stages.interfaces import Samples, Scratch, Stream
from stages.runtime.block_context import BlockContext
from stages.training.trainer import BlockTrainer, Purpose, Training, TrainingSettings


@dataclass(frozen=True)
class CompensatedBlock:
    """A block's fp32 state after training, and the training report."""

    state: dict[str, Tensor]
    training: Training


def compensate_block(
    context: BlockContext,
    biased_in: Samples,
    dense_in: Samples,
    dense_out: Stream,
    settings: TrainingSettings,
    spill: Scratch | None = None,
) -> CompensatedBlock:
    """Train a block so that its output on the biased stream matches the original block's on the dense stream.

    Args:
        context: The block and its N samples.
        biased_in: The block's input through the pruned blocks, N samples (T, H).
        dense_in: The block's input through the original blocks, N samples (T, H).
        dense_out: Receives the original block's output of `dense_in`, the training target, N samples (T, H). With 0
            epochs, nothing more is done.
        settings: How to train.
        spill: Scratch space for the best weights so far; None: they stay in memory as a second copy of the block.

    Raises:
        NumericalError: The loss is not finite.
    """
    block = context.load()
    purpose = Purpose("compensate", passes_before=1, passes_after=0)
    trainer = BlockTrainer(context, block, biased_in, dense_out, settings, purpose, spill)
    trainer.first_pass(makes_targets_of=dense_in)
    training = trainer.train(list(block.parameters()))
    return CompensatedBlock({name: tensor.to("cpu") for name, tensor in block.state_dict().items()}, training)
