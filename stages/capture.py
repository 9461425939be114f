"""Lines 1-2 of the paper's Algorithm 1: embed the calibration set and start both streams of activations.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import contextlib

import torch

from stages.interfaces import Stream
from stages.machine.device import computing
from stages.models.base import tokens_of
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import micro_batches
from stages.runtime.prefetch import Reading, Writing


@torch.no_grad()
def capture(context: StageContext, biased: Stream, dense_out: Stream | None) -> None:
    """Write the input of block 0 to `biased` and, if requested, the output of the original block 0 to `dense_out`.

    The dense output is computed from the input as stored, so that a later replay gives the same bits.

    Args:
        context: The model and its N samples.
        biased: Receives N samples of hidden states, (T, H).
        dense_out: Receives N samples of hidden states, (T, H); None: not needed.
    """
    model, inputs, choices = context.model, context.inputs, context.device
    device = choices.torch_device
    ends = model.load_ends(device, part="enter")
    block = model.load_block(0, device) if dense_out is not None else None
    batches = micro_batches(range(len(inputs)), tokens_of(model, inputs), choices)
    with contextlib.ExitStack() as stack:
        read = stack.enter_context(Reading(batches, (inputs,), device))
        biased_out = stack.enter_context(Writing(biased, device))
        blocks_out = stack.enter_context(Writing(dense_out, device)) if dense_out is not None else None
        for numbers, (tokens,) in read:
            context.callbacks.check_stop()
            with computing(choices):
                entry = ends.enter(tokens)
            hidden = entry.hidden.to(choices.torch_dtype)
            biased_out.write(numbers, hidden)
            if blocks_out is not None and block is not None:
                with computing(choices):
                    # A copy, because the writer may still read `hidden`, and a block may work in place.
                    blocks_out.write(numbers, model.run_block(block, hidden.clone(), entry.calls[0]))
            context.callbacks.report(numbers[-1] + 1, len(inputs), "samples")
