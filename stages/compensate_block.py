"""Lines 6-8 of the paper's Algorithm 1: let the next, still dense block learn away what pruning cost.

dense_out = B_original(dense_in)                      line 7
B <- argmin |B(biased_in) - dense_out|^2              line 8, LAMP Eq. 9, by Adam over all of B's parameters
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stages.interfaces import Callbacks, Scratch, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.training.trainer import BlockTrainer, Training, TrainingSettings


@dataclass(frozen=True)
class CompensatedBlock:
    """A block's fp32 state after training, and how it got there."""

    state: dict[str, Tensor]
    training: Training


def compensate_block(
    model: BlockModel,
    block_index: int,
    inputs: Stream,
    biased_in: Stream,
    dense_in: Stream,
    dense_out: Stream,
    settings: TrainingSettings,
    choices: DeviceChoices,
    callbacks: Callbacks,
    spill: Scratch | None = None,
) -> CompensatedBlock:
    """Train block `block_index` to give, on the biased stream, what the original gives on the dense one.

    inputs: token ids of the N samples. biased_in, dense_in, dense_out: N samples (tokens, hidden); `dense_out`
    is written first, by the original block, and then is the target. With no epochs, that is all that is done.
    spill: room for the best weights so far, which otherwise are a second block in memory.
    Raises NumericalError if the loss stops being finite.
    """
    block = model.load_block(block_index, choices.torch_device)
    trainer = BlockTrainer(
        *(model, block, block_index, inputs, biased_in, dense_out, settings, choices, callbacks),
        purpose="compensate",
        spill=spill,
        passes_before=2,
    )

    trainer.first_pass(makes_targets_of=dense_in)
    training = trainer.train(list(block.parameters()))
    return CompensatedBlock({name: tensor.to("cpu") for name, tensor in block.state_dict().items()}, training)
