"""Run one block over the samples of a stream in micro-batches, with prefetching and writing in the background.

Every stage runs its passes through this module: it alone decides what is read, when, and how many samples share a
forward pass.

T: tokens of a sample.    H: hidden size.
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
    """Reports the progress of work that consists of several passes."""

    def __init__(self, watcher: Watcher, total: int, unit: str, done: int = 0) -> None:
        self._watcher, self._total, self._unit, self._done = watcher, total, unit, done

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Report that `count` more units are done, with metrics to show."""
        self._done += count
        self._watcher.report(self._done, self._total, self._unit, **metrics)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, on the device."""

    numbers: Sequence[int]  # which samples
    call: BlockCall  # the block's arguments beside the hidden state
    samples: tuple[Tensor, ...]  # one tensor per stream, (samples, T, H)


def micro_batches(indices: Sequence[int], tokens: int, choices: DeviceChoices) -> list[Sequence[int]]:
    """Split `indices`, in their order, into micro-batches for samples of `tokens` tokens."""
    size = samples_at_once(choices, tokens)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def samples_at_once(choices: DeviceChoices, tokens: int) -> int:
    """How many samples of `tokens` tokens share a forward pass without gradients: at least one."""
    return max(choices.batch_tokens // tokens, 1)


class BlockRunner:
    """Runs a block over the calibration set."""

    def __init__(
        self, model: BlockModel, block: nn.Module, block_index: int, inputs: Samples, choices: DeviceChoices
    ) -> None:
        """Prepare the passes.

        Args:
            model: The model of the block.
            block: On the device of `choices`.
            block_index: From 0.
            inputs: The model's input of each sample, such as token ids (T,).
            choices: Device, compute dtype and size of micro-batches.
        """
        self._model, self._block, self._block_index = model, block, block_index
        self._inputs, self._choices, self._device = inputs, choices, choices.torch_device
        self._calls = model.calls(self._device)
        # torch reuses the compiled code for all blocks of the same kind: only the first one of a run is compiled. A
        # block with experts would be compiled again for every number of tokens that an expert gets.
        compiles = choices.compiles and not any(info.peers is not None for info in model.layers(block_index))
        self._trained: nn.Module = torch.compile(block, dynamic=False) if compiles else block  # type: ignore[assignment]

    def batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The micro-batches of the samples `indices`."""
        return micro_batches(indices, tokens_of(self._model, self._inputs), self._choices) if len(indices) else []

    @contextlib.contextmanager
    def reading(self, batches: Sequence[Sequence[int]], *streams: Samples) -> Iterator[Iterator[Batch]]:
        """Context with an iterator over the micro-batches of the streams, which are prefetched."""
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
        """The block's output, (samples, T, H). hidden: its input, (samples, T, H)."""
        with computing(self._choices):
            return self._model.run_block(self._block, hidden, call)

    def training_forward(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """`forward` for a training step: in its own dtype, and through torch.compile if these are chosen.

        Both change values by rounding only. Training in fp32 on streams in half precision, no autocast brings what the
        streams hold and the weights together.
        """
        if self._choices.torch_train_dtype == torch.float32 != self._choices.torch_dtype:
            hidden, call = hidden.float(), call.float()
        with computing(self._choices, trains=True):
            return self._model.run_block(self._trained, hidden, call)

    @torch.no_grad()
    def propagate(
        self, source: Samples, target: Stream, boundary: Callable[[], None], advance: Callable[[int], None]
    ) -> None:
        """Write the block's output of every sample to `target`.

        Args:
            source: The block's input of each sample, (T, H).
            target: Receives the outputs, (T, H); may be the same stream as `source`.
            boundary: Called before each micro-batch.
            advance: Called after each micro-batch with its number of samples.
        """
        batches = self.batches(range(len(self._inputs)))
        with self.reading(batches, source) as read, Writing(target, self._device) as out:
            for batch in read:
                boundary()
                out.write(batch.numbers, self.forward(batch.samples[0], batch.call))
                advance(len(batch.numbers))
