"""Lines 1-3 of the paper's Algorithm 1: embed the calibration set and open both streams of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.device import DeviceChoices, computing
from stages.models.base import BlockModel
from stages.protocols import Hooks, Stream


@torch.no_grad()
def capture(
    model: BlockModel,
    inputs: Stream,
    biased: Stream,
    dense_out: Stream | None,
    choices: DeviceChoices,
    hooks: Hooks,
) -> None:
    """Write the input of block 0 to `biased` and, if asked, block 0's own output to `dense_out`.

    inputs: N samples of token ids, each (tokens,). biased, dense_out: N samples (tokens, hidden).
    The dense output is computed from the input as stored, so that rebuilding it later gives the same bits.
    """
    device = choices.torch_device
    ends = model.load_ends(device, part="enter")
    block = model.load_block(0, device) if dense_out is not None else None
    for index in range(len(inputs)):
        hooks.check_stop()
        with computing(choices):
            entry = ends.enter(batch_of_one(inputs[index], device))
        hidden = entry.hidden.to(choices.torch_dtype)
        biased.write(index, hidden[0])
        if dense_out is not None and block is not None:
            with computing(choices):
                dense_out.write(index, model.run_block(block, hidden, entry.calls[0])[0])
        hooks.report(index + 1, len(inputs), "samples")


def batch_of_one(sample: Tensor, device: torch.device) -> Tensor:
    """`sample` (...) as (1, ...) on the device."""
    return sample.to(device, non_blocking=True)[None]
