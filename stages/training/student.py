"""The pruned model while it is distilled: streamed, with one block in memory, or resident, with all of them.

Both do the same arithmetic in the same order, so their weights are bit-identical (`stages.distill`).

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from stages.interfaces import Checkpoint, Scratch
from stages.models.base import Ends
from stages.training.distillation_work import Block, Work
from stages.training.kept_weights import without_moments


class Student(ABC):
    """The pruned model while it is trained."""

    def __init__(self, work: Work, stored: Collection[str]) -> None:
        """Begin. stored: parts of the checkpoint from which the work is resumed; empty: begin with the pruned model."""
        self._work = work
        self._num_blocks = work.model.num_blocks
        self._has_best = _best(0) in stored

    @property
    def ends(self) -> Ends | None:
        """The model's ends, if they are in memory all the time."""
        return None

    @abstractmethod
    def update(self, numbers: Sequence[int], lr: float) -> float:
        """Train on a batch of samples. Returns their mean loss before the update."""

    @abstractmethod
    def losses(self, numbers: Sequence[int]) -> list[float]:
        """The loss of each of these samples."""

    @abstractmethod
    def weights(self, index: int) -> Mapping[str, Tensor]:
        """The trained weights of a block."""

    @abstractmethod
    def _set_weights(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Replace the weights of a block; its moments stay."""

    @abstractmethod
    def store(self) -> None:
        """Store weights and moments, for a checkpoint."""

    @abstractmethod
    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """Checkpoint an update that has ended, if one is due."""

    @abstractmethod
    def stop_or_checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """Stop between two passes of an update, if requested."""

    def keep_direction(self) -> None:
        """Remember the weights after the first update, for `move`. They take the place of the best ones."""
        self._keep_as_best()

    @torch.no_grad()
    def move(self, distance: float) -> None:
        """Go to a place on the line from the pruned model (0) through the weights of `keep_direction` (1)."""
        for index in range(self._num_blocks):
            start, end = self._work.start(index), self._work.callbacks.kept(_best(index))
            self._set_weights(index, {name: _between(start[name], end[name], distance) for name in end})

    @property
    def parts(self) -> list[str]:
        """Names of what a checkpoint needs."""
        kinds = (_current, _best) if self._has_best else (_current,)
        return [kind(index) for kind in kinds for index in range(self._num_blocks)]

    def save_best(self) -> None:
        """Store the weights as the best so far."""
        self._keep_as_best()
        self._has_best = True

    def _keep_as_best(self) -> None:
        for index in range(self._num_blocks):
            self._work.callbacks.keep(_best(index), self.weights(index))

    def restore_best(self) -> None:
        """Return to the best weights so far: those stored, or those of the pruned model."""
        for index in range(self._num_blocks):
            best = self._work.callbacks.kept(_best(index)) if self._has_best else self._work.start(index)
            self._set_weights(index, best)


class Resident(Student):
    """All blocks are in memory. A sample's activations are kept from its forward to its backward pass."""

    def __init__(self, work: Work, stored: Collection[str]) -> None:
        super().__init__(work, stored)
        self._blocks = [
            work.load(index, work.callbacks.kept(_current(index)) if stored else None)
            for index in range(self._num_blocks)
        ]
        self._ends = work.model.load_ends(work.device, "all")
        work.model.drop_ends()  # they are held here

    @property
    def ends(self) -> Ends:
        return self._ends

    def update(self, numbers: Sequence[int], lr: float) -> float:
        work, losses = self._work, []
        for number in numbers:
            inputs = work.inputs(number)
            hidden, passed = work.enter(self._ends, inputs), []
            for block in self._blocks:
                work.boundary()
                leaf = hidden.float().requires_grad_()
                out = work.run(block, leaf, inputs, trains=True)
                passed.append((leaf, out))
                hidden = out.detach().to(work.choices.torch_dtype)
                work.advance()
            work.boundary()
            loss, gradient = work.end(self._ends, number, hidden, needs_gradient=True)
            assert gradient is not None
            gradient /= len(numbers)
            losses.append(loss)
            work.advance(loss)
            while passed:
                work.boundary()
                leaf, out = passed.pop()
                gradient = _backward(leaf, out, gradient)
                work.advance()
        for block in reversed(self._blocks):
            block.adam.step(lr)
        return math.fsum(losses) / len(losses)

    @torch.no_grad()
    def losses(self, numbers: Sequence[int]) -> list[float]:
        work, losses = self._work, []
        for number in numbers:
            inputs = work.inputs(number)
            hidden = work.enter(self._ends, inputs)
            for block in self._blocks:
                work.boundary()
                hidden = work.run(block, hidden.float(), inputs, trains=False).to(work.choices.torch_dtype)
                work.advance()
            work.boundary()
            losses.append(work.end(self._ends, number, hidden, needs_gradient=False).value)
            work.advance(losses[-1])
        return losses

    def weights(self, index: int) -> Mapping[str, Tensor]:
        return self._blocks[index].weights()

    def _set_weights(self, index: int, state: Mapping[str, Tensor]) -> None:
        self._blocks[index].set_weights(state)

    def store(self) -> None:
        for block in self._blocks:
            self._work.callbacks.keep(_current(block.index), block.tensors())

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        self._work.callbacks.checkpoint(make)

    def stop_or_checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        self._work.callbacks.checkpoint(make)  # weights and moments are those of the last update


class Streamed(Student):
    """One block is in memory. Hidden states between blocks, and weights and moments of the others, are stored."""

    def __init__(self, work: Work, stored: Collection[str], scratch: Scratch, most_samples: int) -> None:
        """most_samples: the most samples that pass through the blocks together."""
        super().__init__(work, stored)
        shape, dtype = work.context.hidden_shape, work.choices.torch_dtype
        self._most = most_samples
        # The input of every block of each sample of a batch; the last place of a sample is its output.
        self._hidden = scratch.stream("hidden", most_samples * (self._num_blocks + 1), shape, dtype)
        self._gradients = scratch.stream("gradients", most_samples, shape, torch.float32)
        self._is_trained = bool(stored)

    def update(self, numbers: Sequence[int], lr: float) -> float:
        work = self._work
        self._forward(numbers)
        ends = work.model.load_ends(work.device, "leave")
        losses = []
        for place, number in enumerate(numbers):
            work.boundary()
            hidden = work.read(self._hidden, self._place(self._num_blocks, place))
            loss, gradient = work.end(ends, number, hidden, needs_gradient=True)
            assert gradient is not None
            self._gradients.write(place, (gradient / len(numbers))[0])
            losses.append(loss)
            work.advance(loss)
        del ends
        work.model.drop_ends()
        for index in reversed(range(self._num_blocks)):
            block = self._load(index)
            for place, number in enumerate(numbers):
                work.boundary()
                leaf = work.read(self._hidden, self._place(index, place)).float().requires_grad_()
                out = work.run(block, leaf, work.inputs(number), trains=True)
                gradient = _backward(leaf, out, work.read(self._gradients, place))
                self._gradients.write(place, gradient[0])
                work.advance()
            block.adam.step(lr)
            work.callbacks.keep(_current(index), block.tensors())
            del block
        self._is_trained = True
        return math.fsum(losses) / len(losses)

    def losses(self, numbers: Sequence[int]) -> list[float]:
        return self._work.losses(numbers, partial(self._load, with_adam=False), self._hidden)

    def _forward(self, numbers: Sequence[int]) -> None:
        """Pass samples through all blocks, and keep the input of each."""
        work = self._work
        ends = work.model.load_ends(work.device, "enter")
        for place, number in enumerate(numbers):
            work.boundary()
            self._hidden.write(self._place(0, place), work.enter(ends, work.inputs(number))[0])
        del ends
        work.model.drop_ends()
        for index in range(self._num_blocks):
            block = self._load(index, with_adam=False)
            for place, number in enumerate(numbers):
                work.boundary()
                # Gradients are enabled as they are when the block is resident.
                leaf = work.read(self._hidden, self._place(index, place)).float().requires_grad_()
                out = work.run(block, leaf, work.inputs(number), trains=True).detach()
                self._hidden.write(self._place(index + 1, place), out[0])
                work.advance()
            del block

    def _place(self, index: int, place: int) -> int:
        """Where the input of block `index` of a sample of the batch lies."""
        return index * self._most + place

    def _load(self, index: int, *, with_adam: bool = True) -> Block:
        tensors = self._work.callbacks.kept(_current(index)) if self._is_trained else None
        return self._work.load(index, tensors, with_adam=with_adam)

    def weights(self, index: int) -> Mapping[str, Tensor]:
        return without_moments(self._work.callbacks.kept(_current(index)))

    def _set_weights(self, index: int, state: Mapping[str, Tensor]) -> None:
        block = self._load(index)
        block.set_weights(state)
        self._work.callbacks.keep(_current(index), block.tensors())

    def store(self) -> None:
        """Nothing is left to store."""

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        self._work.callbacks.checkpoint_now(make)

    def stop_or_checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        # Some blocks may be stored as the unfinished update has them.
        self._work.callbacks.check_stop()


def _between(start: Tensor, end: Tensor, distance: float) -> Tensor:
    """A place on the line from `start` (0) through `end` (1)."""
    if not end.is_floating_point():
        return end
    start = start.to(end.dtype)
    return start + distance * (end - start)


def _backward(leaf: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    """Add up a block's gradients, and return that of its input, (1, T, H). gradient: of the block's output."""
    out.backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


def _current(index: int) -> str:
    return f"block-{index:05d}"


def _best(index: int) -> str:
    return f"best-{index:05d}"
