"""Perplexity of a model, original or pruned, with one block in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.data.text_source import TextSource
from stages.data.tokenization import evaluation_tokens, require_vocabulary
from stages.interfaces import Callbacks, Checkpoint, Scratch, Stream
from stages.machine.device import DeviceChoices, computing
from stages.metrics.perplexity import perplexity, window_loss
from stages.metrics.perplexity import windows as cut
from stages.models.base import BlockModel
from stages.runtime.block_runner import BlockRunner, micro_batches
from stages.runtime.prefetch import Reading, Writing

# Windows that pass through a block before the next is loaded: many, since each block is read once for them all.
_TOKENS_AT_ONCE = 64 * 2048


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


@dataclass(frozen=True)
class TextResult:
    """Perplexity on a text source, and how much of it was read."""

    source: str
    perplexity: float
    num_windows: int
    num_tokens: int
    num_tokens_available: int
    seqlen: int
    is_partial: bool  # max_tokens left windows out that the field would evaluate on


def evaluate_text(
    model: BlockModel,
    source: TextSource,
    tokenizer: Any,
    seqlen: int,
    max_tokens: int | None,
    scratch: Scratch,
    choices: DeviceChoices,
    callbacks: Callbacks,
) -> TextResult:
    """Perplexity on a source as the field reads it: tokenized once, cut into windows, the tail dropped.

    max_tokens: a quick look at so many tokens from the start. Raises UsageError where not one window is filled, or
    the tokenizer is that of another model; ResourceError where the hub is out of reach.
    """
    tokens = evaluation_tokens(source, tokenizer)
    require_vocabulary(tokens, model.vocab_size, model.source.name)
    num_available = len(cut(tokens, seqlen, None, source.max_windows))
    read = cut(tokens, seqlen, max_tokens, source.max_windows)
    result = evaluate_perplexity(model, read, scratch, choices, callbacks)
    return TextResult(
        source=source.name,
        perplexity=result.perplexity,
        num_windows=result.num_windows,
        num_tokens=result.num_tokens,
        num_tokens_available=tokens.numel(),
        seqlen=result.seqlen,
        is_partial=result.num_windows < num_available,
    )


@torch.no_grad()
def evaluate_perplexity(
    model: BlockModel, windows: Tensor, scratch: Scratch, choices: DeviceChoices, callbacks: Callbacks
) -> PerplexityResult:
    """Perplexity over `windows` (n, seqlen) of token ids.

    The activations of many windows pass through one block before the next is loaded, by way of one scratch
    stream, so the memory needed is that of pruning. Stopped, it goes on after the last group of windows.
    """
    num_windows, seqlen = windows.shape
    group = min(max(_TOKENS_AT_ONCE // seqlen, 1), num_windows)
    stream = scratch.stream("hidden", group, (seqlen, model.hidden_size), choices.torch_dtype)
    measuring = _Measuring(model, windows, stream, choices, callbacks)
    for start in range(len(measuring.losses), num_windows, group):
        measuring.measure(range(start, min(start + group, num_windows)))
    return PerplexityResult(perplexity(measuring.losses), num_windows, seqlen)


class _Windows:
    """Windows of text as `Samples`."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._windows[index].clone()


class _Measuring:
    """The losses of the windows that are done, and how the next ones are measured."""

    def __init__(
        self, model: BlockModel, windows: Tensor, stream: Stream, choices: DeviceChoices, callbacks: Callbacks
    ):
        self.model, self.windows, self.stream = model, windows, stream
        self.choices, self.callbacks, self.device = choices, callbacks, choices.torch_device
        # Of the very text: a run may be evaluated on another one under the same name.
        self._text = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        self.losses: list[float] = []
        restored = callbacks.restore()
        if restored is not None and restored.figures["text"] == self._text:
            self.losses = restored.figures["losses"]
        self._passes = model.num_blocks + 2  # in, through each block, out
        self._done = len(self.losses) * self._passes

    def measure(self, numbers: Sequence[int]) -> None:
        """Add the losses of these windows, no more than the stream holds."""
        inputs = _Windows(self.windows[numbers[0] : numbers[-1] + 1])
        places = range(len(inputs))
        ends = self.model.load_ends(self.device, part="enter")
        batches = micro_batches(places, self.windows.shape[1], self.choices)
        with Reading(batches, (inputs,), self.device) as read, Writing(self.stream, self.device) as out:
            for group, (tokens,) in read:
                self._boundary()
                with computing(self.choices):
                    hidden = ends.enter(tokens).hidden
                out.write(group, hidden)
                self._advance(len(group))
        del ends
        for block_index in range(self.model.num_blocks):
            block = self.model.load_block(block_index, self.device)
            block_pass = BlockRunner(self.model, block, block_index, inputs, self.choices)
            block_pass.propagate(self.stream, self.stream, self._boundary, self._advance)
            del block, block_pass
        ends = self.model.load_ends(self.device, part="leave")
        losses: list[float] = []
        with Reading([[place] for place in places], (inputs, self.stream), self.device) as read:
            for _, (window, hidden) in read:
                self._boundary()
                with computing(self.choices):
                    logits = ends.leave(window, hidden)
                losses.append(window_loss(logits, window))
                self._advance(perplexity=perplexity([*self.losses, *losses]))
        self.losses = [*self.losses, *losses]

    def _boundary(self) -> None:
        self.callbacks.checkpoint(lambda: Checkpoint(figures={"text": self._text, "losses": self.losses}))

    def _advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self.callbacks.report(self._done, len(self.windows) * self._passes, "windows", **figures)
