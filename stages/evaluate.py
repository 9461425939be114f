"""Perplexity of a model, original or pruned, with one block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.capture import batch_of_one
from stages.device import DeviceChoices, computing
from stages.metrics.perplexity import perplexity, window_loss
from stages.models.base import BlockModel
from stages.protocols import Hooks, Scratch


@dataclass(frozen=True)
class PerplexityResult:
    """exp(mean over windows of mean next-token cross-entropy), and what it was measured on."""

    perplexity: float
    num_windows: int
    seqlen: int

    @property
    def num_tokens(self) -> int:
        """Tokens read (each window predicts one fewer)."""
        return self.num_windows * self.seqlen


@torch.no_grad()
def evaluate_perplexity(
    model: BlockModel, windows: Tensor, scratch: Scratch, choices: DeviceChoices, hooks: Hooks
) -> PerplexityResult:
    """Perplexity over `windows` (n, seqlen) of token ids.

    The activations of all windows pass through one block before the next is loaded, by way of one scratch
    stream, so the memory needed is that of pruning.
    """
    num_windows, seqlen = windows.shape
    device = choices.torch_device
    total = num_windows * (model.num_blocks + 1)
    stream = scratch.stream("hidden", num_windows, (seqlen, model.hidden_size), choices.torch_dtype)
    done = 0
    ends = model.load_ends(device, part="enter")
    for block_index in range(model.num_blocks):
        block = model.load_block(block_index, device)
        for index in range(num_windows):
            hooks.check_stop()
            with computing(choices):
                entry = ends.enter(batch_of_one(windows[index], device))
                hidden = entry.hidden if block_index == 0 else batch_of_one(stream[index], device)
                hidden = model.run_block(block, hidden, entry.calls[block_index])
            stream.write(index, hidden[0])
            done += 1
            hooks.report(done, total, "windows")
        del block
    del ends
    ends = model.load_ends(device, part="leave")
    losses: list[float] = []
    for index in range(num_windows):
        hooks.check_stop()
        window = batch_of_one(windows[index], device)
        with computing(choices):
            logits = ends.leave(window, batch_of_one(stream[index], device))
        losses.append(window_loss(logits, window))
        done += 1
        hooks.report(done, total, "windows", perplexity=perplexity(losses))
    return PerplexityResult(perplexity(losses), num_windows, seqlen)
