"""Make a stream of activations once more: forward through blocks that are finished, with nothing learnt anew.

The dense stream went through the original blocks, the biased one through the pruned blocks as they were exported. Each
block is run on what the block before it gave, as stored, so that the bits are those of the first time (on the same
machine and versions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stages.capture import capture
from stages.interfaces import Callbacks, Scratch, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.runtime.block_runner import BlockPass, Counter

StateOf = Callable[[int], Mapping[str, Tensor] | None]


@torch.no_grad()
def replay(
    model: BlockModel,
    inputs: Stream,
    out: Stream,
    num_blocks: int,
    state_of: StateOf,
    scratch: Scratch,
    choices: DeviceChoices,
    callbacks: Callbacks,
) -> None:
    """Write to `out` what the first `num_blocks` blocks make of the calibration set.

    inputs: token ids of the N samples. out: N samples (tokens, hidden). state_of: a block's weights, names relative to
    the block; None: the original's.
    """
    if not num_blocks:
        capture(model, inputs, out, None, choices, callbacks)
        return
    shape = model.hidden_shape(tuple(inputs[0].shape))
    hidden = scratch.stream("replay", len(inputs), shape, choices.torch_dtype)
    capture(model, inputs, hidden, None, choices, callbacks)
    total = num_blocks * len(inputs)
    for block_index in range(num_blocks):
        block = model.load_block(block_index, choices.torch_device, state=state_of(block_index))
        target = out if block_index == num_blocks - 1 else hidden
        counter = Counter(callbacks, total, "samples", done=block_index * len(inputs))
        BlockPass(model, block, block_index, inputs, choices).propagate(
            hidden, target, callbacks.check_stop, counter.advance
        )
