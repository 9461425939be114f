"""One block over the samples of a stream: read ahead, computed in micro-batches, written behind.

Every pass of every stage is one of these, so that what is read, when, and how many samples share a forward pass is
decided in one place. T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.interfaces import Samples, Stream, Watcher
from stages.machine.device import DeviceChoices, computing
from stages.models.base import BlockCall, BlockModel, tokens_of
from stages.runtime.prefetch import Reading, Writing


class Counter:
    """Tells a watcher how far work of several passes is."""

    def __init__(self, watcher: Watcher, total: int, unit: str, done: int = 0) -> None:
        self._watcher, self._total, self._unit, self._done = watcher, total, unit, done

    def advance(self, count: int = 1, **figures: float) -> None:
        """`count` more are done."""
        self._done += count
        self._watcher.report(self._done, self._total, self._unit, **figures)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, on the device."""

    numbers: Sequence[int]  # which samples
    call: BlockCall  # what the block gets beside the hidden state
    samples: tuple[Tensor, ...]  # of each stream that was asked for, (samples, T, H)


def micro_batches(indices: Sequence[int], tokens: int, choices: DeviceChoices) -> list[Sequence[int]]:
    """`indices` in their order, as many together as `choices` has it for samples of so many tokens: at least one."""
    size = samples_at_once(choices, tokens)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def samples_at_once(choices: DeviceChoices, tokens: int) -> int:
    """How many samples of so many tokens share a forward pass where nothing is trained."""
    return max(choices.batch_tokens // tokens, 1)


class BlockPass:
    """Runs a block over the calibration set, as often as it is asked to."""

    def __init__(
        self, model: BlockModel, block: nn.Module, block_index: int, inputs: Samples, choices: DeviceChoices
    ) -> None:
        """block: on the device of `choices`. inputs: the model's input of each sample, such as token ids (T,)."""
        self._model, self._block, self._block_index = model, block, block_index
        self._inputs, self._choices, self._device = inputs, choices, choices.torch_device
        self._calls = model.calls(self._device)
        # Compiled code is kept by torch for all blocks of a kind: only the first one of a run waits for it.
        self._trained: nn.Module = torch.compile(block, dynamic=False) if choices.compiles else block  # type: ignore[assignment]

    def batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The micro-batches of these samples."""
        return micro_batches(indices, tokens_of(self._model, self._inputs), self._choices) if len(indices) else []

    @contextlib.contextmanager
    def reading(self, batches: Sequence[Sequence[int]], *streams: Samples) -> Iterator[Iterator[Batch]]:
        """The micro-batches of the streams, each while the one before is in use."""
        example = self._inputs[0]
        needs_inputs = self._calls.depend_on_inputs(example.to(self._device)[None], self._choices)
        wanted = (self._inputs, *streams) if needs_inputs else streams
        with Reading(batches, wanted, self._device) as read:
            yield self._with_calls(read, example, needs_inputs=needs_inputs)

    def _with_calls(self, read: Reading, example: Tensor, *, needs_inputs: bool) -> Iterator[Batch]:
        for numbers, samples in read:
            if needs_inputs:
                inputs, samples = samples[0], samples[1:]
            else:
                inputs = example.to(self._device).expand(len(numbers), *example.shape)
            yield Batch(numbers, self._calls.of(inputs, self._choices)[self._block_index], samples)

    def forward(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """The block's output, (samples, T, H) as `hidden` is."""
        with computing(self._choices):
            return self._model.run_block(self._block, hidden, call)

    def training_forward(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """The same for a training step, by way of torch.compile if that was chosen: up to rounding the same values."""
        with computing(self._choices):
            return self._model.run_block(self._trained, hidden, call)

    @torch.no_grad()
    def propagate(
        self, source: Samples, target: Stream, boundary: Callable[[], None], advance: Callable[[int], None]
    ) -> None:
        """Write to `target` what the block makes of `source`; they may be one stream.

        boundary: called before each micro-batch. advance: told how many samples have passed.
        """
        batches = self.batches(range(len(self._inputs)))
        with self.reading(batches, source) as read, Writing(target, self._device) as out:
            for batch in read:
                boundary()
                out.write(batch.numbers, self.forward(batch.samples[0], batch.call))
                advance(len(batch.numbers))
