"""Lines 6-8 of the paper's Algorithm 1: train the next, still dense block until it makes up for the pruning error.

dense_out = B_original(dense_in)                      line 7
B <- argmin |B(biased_in) - dense_out|^2              line 8, LAMP Eq. 9, by Adam over all of B's parameters
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stages.interfaces import Samples, Scratch, Stream
from stages.runtime.block_context import BlockContext
from stages.training.trainer import BlockTrainer, Purpose, Training, TrainingSettings


@dataclass(frozen=True)
class CompensatedBlock:
    """A block's fp32 state after training, and how the training went."""

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
    """Train a block to give, on the biased stream, what the original gives on the dense stream.

    Args:
        context: The block and its N samples.
        biased_in: The block's input through the pruned blocks, N samples (T, H).
        dense_in: The block's input through the original blocks, N samples (T, H).
        dense_out: Receives the original block's output of `dense_in`, which is then the target, N samples (T, H).
            With no epochs, this is all that is done.
        settings: How to train.
        spill: Scratch space for the best weights so far, which otherwise are a second block in memory.

    Raises:
        NumericalError: The loss is not finite.
    """
    block = context.load()
    purpose = Purpose("compensate", passes_before=2, passes_after=0)
    trainer = BlockTrainer(context, block, biased_in, dense_out, settings, purpose, spill)
    trainer.first_pass(makes_targets_of=dense_in)
    training = trainer.train(list(block.parameters()))
    return CompensatedBlock({name: tensor.to("cpu") for name, tensor in block.state_dict().items()}, training)
