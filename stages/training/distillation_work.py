"""What both students of a distillation compute with: the model's ends, its pruned blocks with Adam, and the end loss.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from stages.interfaces import DurableCallbacks, Samples, Stream
from stages.machine.device import computing
from stages.models.base import Ends
from stages.runtime.block_context import BlockContext, StageContext
from stages.sparsity.outcome import PruneOutcome
from stages.training.end_loss import EndLoss, LossAndGradient
from stages.training.kept_weights import KeptAdam, exact_on_grid, kept_masked, kept_of, plain_state, without_moments
from stages.training.rates import Rate


@dataclass(frozen=True)
class PrunedBlocks:
    """The finished blocks of the pruned model, read when asked for, by the block's index from 0."""

    state_of: Callable[[int], Mapping[str, Tensor]]  # by names inside the block, in the export dtypes
    dtypes_of: Callable[[int], Mapping[str, torch.dtype]]  # the export dtypes, by the same names
    outcome_of: Callable[[int], PruneOutcome]  # pruning masks and quantization grids


class Listener(Protocol):
    """Hears of the passes of samples through blocks and head."""

    def boundary(self) -> None:
        """Called before each pass: the work may stop here."""
        ...

    def advance(self, loss: float | None = None, /) -> None:
        """Called after each pass. loss: of the sample, after its pass through the head."""
        ...


class Work:
    """The model, its samples and the loss, for either student. The arithmetic is here, and so is the same for both."""

    def __init__(
        self,
        context: StageContext,
        pruned: PrunedBlocks,
        teacher: Samples,
        end_loss: type[EndLoss],
        rate: Rate,
        callbacks: DurableCallbacks,
        listener: Listener,
    ) -> None:
        """Prepare the work.

        Args:
            context: The model and its N samples.
            pruned: The pruned model.
            teacher: The last block's output in the dense model, N samples (T, H).
            end_loss: The loss of the model's output.
            rate: The highest learning rate.
            callbacks: They store parts of the state.
            listener: Hears of every pass.
        """
        choices = context.device
        if torch.float16 in (choices.torch_dtype, choices.torch_train_dtype):
            # Their gradients underflow without a scaler, which would have to know those of all blocks.
            callbacks.warn("distillation computes in float32: gradients in float16 would underflow")
            choices = replace(choices, dtype="float32", train_dtype=None)
        self.context, self.choices = replace(context, device=choices), choices
        self.model, self.device, self.callbacks = context.model, choices.torch_device, callbacks
        self.pruned, self.boundary, self.advance = pruned, listener.boundary, listener.advance
        self._teacher, self._end_loss, self._rate = teacher, end_loss, rate

    def inputs(self, number: int) -> Tensor:
        """The model's input of a sample, as a batch of one."""
        return self.context.inputs[number][None].to(self.device)

    @torch.no_grad()
    def enter(self, ends: Ends, inputs: Tensor) -> Tensor:
        """The input of block 0, (1, T, H)."""
        with computing(self.choices):
            return ends.enter(inputs).hidden.to(self.choices.torch_dtype)

    def load(self, index: int, tensors: Mapping[str, Tensor] | None, *, with_adam: bool = True) -> Block:
        """A block.

        Args:
            index: Which, from 0.
            tensors: Weights and moments, each read when asked for; None: the pruned block, without moments.
            with_adam: It can make a step, and its moments are read.
        """
        state = self.start(index) if tensors is None else without_moments(tensors)
        return Block(self.context.block(index), self.pruned, state, self._rate if with_adam else None, tensors)

    def of_state(self, index: int, state: Mapping[str, Tensor]) -> Block:
        """A block with other weights, in the export dtypes, to be run only."""
        return Block(self.context.block(index), self.pruned, self._exact(index, state), None, None)

    def start(self, index: int) -> Mapping[str, Tensor]:
        """The weights of a pruned block, with which training begins."""
        return self._exact(index, self.pruned.state_of(index))

    def _exact(self, index: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return exact_on_grid(self.model, index, self.pruned.outcome_of(index), state)

    def run(self, block: Block, hidden: Tensor, inputs: Tensor, *, trains: bool) -> Tensor:
        """The block's output (1, T, H) in fp32. trains: with the arithmetic of training steps."""
        call = self.model.calls(self.device).of(inputs, self.choices)[block.index]
        forward = block.runner.training_forward if trains else block.runner.forward
        return forward(hidden, call).float()

    def end(self, ends: Ends, number: int, hidden: Tensor, *, needs_gradient: bool) -> LossAndGradient:
        """The loss of a sample. hidden: the last block's output, (1, T, H)."""
        target = self._teacher[number][None].to(self.device)
        vocabulary = self.model.vocab_size
        return self._end_loss.of(ends, self.inputs(number), hidden, target, vocabulary, needs_gradient=needs_gradient)

    @torch.no_grad()
    def losses(
        self, numbers: Sequence[int], load: Callable[[int], Block], hidden: Stream, held: Ends | None = None
    ) -> list[float]:
        """The loss of each of these samples, with one block in memory.

        Args:
            numbers: Of the samples.
            load: Gives a block.
            hidden: Room for the hidden states of all of them, (T, H) each; whatever it holds is overwritten.
            held: The model's ends, if they are in memory all the time.
        """
        ends = held or self.model.load_ends(self.device, "enter")
        for place, number in enumerate(numbers):
            self.boundary()
            hidden.write(place, self.enter(ends, self.inputs(number))[0])
        del ends
        self.model.drop_ends()
        for index in range(self.model.num_blocks):
            block = load(index)
            for place, number in enumerate(numbers):
                self.boundary()
                out = self.run(block, self.read(hidden, place).float(), self.inputs(number), trains=False)
                hidden.write(place, out[0])
                self.advance()
            del block
        ends, losses = held or self.model.load_ends(self.device, "leave"), []
        for place, number in enumerate(numbers):
            self.boundary()
            losses.append(self.end(ends, number, self.read(hidden, place), needs_gradient=False).value)
            self.advance(losses[-1])
        return losses

    def read(self, stream: Samples, place: int) -> Tensor:
        """A sample of a stream, as a batch of one on the device."""
        return stream[place][None].to(self.device)


class Block:
    """A block on the device with its masks in force, and Adam."""

    def __init__(
        self,
        context: BlockContext,
        pruned: PrunedBlocks,
        state: Mapping[str, Tensor],
        rate: Rate | None,
        tensors: Mapping[str, Tensor] | None,
    ) -> None:
        """Prepare the block.

        Args:
            context: The block in its model.
            pruned: Gives its pruning masks, quantization grids and export dtypes.
            state: Its weights.
            rate: The highest learning rate; None: it makes no step, and has no Adam.
            tensors: The moments are among them; None: there are none yet.
        """
        self.index = context.index
        self._module = context.load(state)
        outcome = pruned.outcome_of(self.index).to(context.device.torch_device)
        masked = kept_masked(context.model, self._module, self.index, outcome, pruned.dtypes_of(self.index))
        self._masking = contextlib.ExitStack()
        self._masking.enter_context(masked)
        self._module.requires_grad_(True)
        self._adam: KeptAdam | None = None
        if rate is not None:
            self._adam = KeptAdam(self._module, kept_of(context.model, self.index, outcome), rate)
            if tensors is not None:
                self._adam.load(tensors)
        self.runner = context.runner(self._module)

    @property
    def adam(self) -> KeptAdam:
        """Of a block that can make a step."""
        assert self._adam is not None
        return self._adam

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by their names in the block, on the CPU."""
        return {name: tensor.detach().to("cpu") for name, tensor in plain_state(self._module).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, on the CPU."""
        moments = {name: tensor.to("cpu") for name, tensor in self.adam.tensors().items()}
        return {**self.weights(), **moments}

    @torch.no_grad()
    def set_weights(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the weights; moments stay."""
        for name, tensor in plain_state(self._module).items():
            tensor.copy_(state[name])
