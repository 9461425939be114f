"""Recompute a stream of activations by a forward pass through finished blocks.

The dense stream passes through the original blocks, the biased stream through the pruned blocks as exported. Each block
reads the stored output of the block before it, so that the result is bit-identical to the first computation (on the
same device and versions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stages.capture import capture
from stages.interfaces import Scratch, Stream
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import Counter

StateOf = Callable[[int], Mapping[str, Tensor] | None]


@torch.no_grad()
def replay(context: StageContext, out: Stream, num_blocks: int, state_of: StateOf, scratch: Scratch) -> None:
    """Write to `out` the output of the first `num_blocks` blocks on the calibration set.

    Args:
        context: The model and its N samples.
        out: Receives N samples of hidden states, (T, H).
        num_blocks: How many blocks the samples pass through.
        state_of: Returns a block's weights by their names inside the block; None: the original weights.
        scratch: Space for the hidden states between the blocks.
    """
    if not num_blocks:
        capture(context, out, None)
        return
    num_samples = len(context.inputs)
    hidden = scratch.stream("replay", num_samples, context.hidden_shape, context.device.torch_dtype)
    capture(context, hidden, None)
    for index in range(num_blocks):
        block_context = context.block(index)
        block = block_context.load(state_of(index))
        target = out if index == num_blocks - 1 else hidden
        counter = Counter(context.callbacks, num_blocks * num_samples, "samples", done=index * num_samples)
        block_context.runner(block).propagate(hidden, target, context.callbacks.check_stop, counter.advance)
