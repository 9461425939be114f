"""Samples through all blocks of a model by way of one stream, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stages.interfaces import Samples, Stream
from stages.machine.device import DeviceChoices, computing
from stages.models.base import BlockModel, tokens_of
from stages.runtime.block_runner import BlockRunner, micro_batches
from stages.runtime.prefetch import Reading, Writing


class Shaped:
    """Inputs that only tell their shape, for models whose blocks get nothing else from them."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._count, self._zeros = count, torch.zeros(shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> torch.Tensor:
        return self._zeros


def num_passes(model: BlockModel) -> int:
    """Passes over a sample until it is measured: in, through each block, out."""
    return model.num_blocks + 2


def through_blocks(
    model: BlockModel,
    samples: tuple[Samples, Samples],
    stream: Stream,
    choices: DeviceChoices,
    boundary: Callable[[], None],
    advance: Callable[[int], None],
) -> None:
    """Write the last block's output for each sample to the stream.

    Args:
        model: Original or pruned.
        samples: What the model is given, and what its blocks need of that: the same, or `Shaped`.
        stream: As long as the samples, or longer.
        choices: Device and compute dtype.
        boundary: Called between micro-batches; it may stop the work.
        advance: Called with the number of samples that passed.
    """
    inputs, needed = samples
    device = choices.torch_device
    ends = model.load_ends(device, part="enter")
    batches = micro_batches(range(len(inputs)), tokens_of(model, needed), choices)
    with Reading(batches, (inputs,), device) as read, Writing(stream, device) as out:
        for group, (batch,) in read:
            boundary()
            with computing(choices):
                hidden = ends.enter(batch).hidden
            out.write(group, hidden)
            advance(len(group))
    del ends
    for block_index in range(model.num_blocks):
        block = model.load_block(block_index, device)
        block_pass = BlockRunner(model, block, block_index, needed, choices)
        block_pass.propagate(stream, stream, boundary, advance)
        del block, block_pass
