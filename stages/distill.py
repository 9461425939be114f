"""Distill the pruned model towards the dense one, all blocks together, with the pruning masks fixed.

    minimize  loss(head(B^n(...B^1(z^0))), head(dense output))   over the kept weights, biases and norms of the blocks

Local targets cannot undo the error that has piled up in the residual stream; the end loss (`stages.training.end_loss`)
has to undo only what the output sees. The paper has no such step. The dense model's last hidden states are computed
before; what is outside the blocks does not change.

An update takes a batch of B samples:

    forward     for each block: its input of every sample of the batch is kept, and passed through it
    head        the loss, and its gradient with respect to the last block's output
    backward    for each block, from the last: its gradient, recomputed from its input, and a step of Adam

Streamed, one block is in memory at a time, and its weights and moments are stored after every update. Resident, all are
in memory, and no block runs twice. Both do the same arithmetic in the same order: the weights are bit-identical.

N: samples.    B: samples of a batch.    T: tokens of a sample.    H: hidden size.    n: blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stages.errors import NumericalError
from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Checkpoint, DurableCallbacks, Samples, Scratch
from stages.machine.device import computing
from stages.models.base import Ends
from stages.runtime.block_context import BlockContext, BlockOutput, StageContext
from stages.sparsity.outcome import PruneOutcome
from stages.tasks.registry import task_named
from stages.training.end_loss import EndLoss, LossAndGradient
from stages.training.kept_weights import KeptAdam, kept_masked, kept_of, plain_state, without_moments
from stages.training.loss import split_samples
from stages.training.seeding import generator_for
from stages.training.trainer import BACKTRACK, Losses

# Share of the updates in which the learning rate rises to its full value.
_WARM_UP = 1 / 15


@dataclass(frozen=True)
class DistillSettings:
    """How to distill."""

    epochs: int
    lr: float  # the highest learning rate of Adam: it rises, then falls to zero along a cosine
    batch: int  # samples of an update, about: an epoch's samples are split evenly
    # Measure each epoch on held-out samples; undo an epoch without improvement. False: train on all samples, and keep
    # the last weights.
    holds_out: bool
    seed: int


@dataclass(frozen=True)
class PrunedBlocks:
    """The finished blocks of the pruned model, read when asked for, by the block's index from 0."""

    state_of: Callable[[int], Mapping[str, Tensor]]  # by names inside the block, in the export dtype
    outcome_of: Callable[[int], PruneOutcome]  # pruning masks and quantization grids


@dataclass(frozen=True)
class Distillation:
    """Report of a distillation."""

    loss: str  # name of the end loss
    before: float | None  # on the held-out samples; None: there are none
    after: float | None
    epochs: tuple[Losses, ...]  # `trained` is the mean over the epoch's updates, each before it took effect
    updates: tuple[float, ...]  # the mean loss of each batch, before its update
    kept_epoch: int  # the epoch whose weights were kept, from 1; 0: no epoch improved the model
    num_held_out: int


@dataclass
class _Course:
    """State without weights and moments, after the last finished update. Field names are part of the checkpoints."""

    before: float | None = None
    epoch: int = 1  # the current one
    losses: list[float] = field(default_factory=list)  # of the epoch's updates so far
    epochs: list[Losses] = field(default_factory=list)  # of the finished epochs
    updates: list[float] = field(default_factory=list)
    best: float = math.inf  # the lowest held-out loss so far
    kept_epoch: int = 0
    rate: float = 1.0  # factor of the learning rate after backtracking
    is_over: bool = False  # every epoch is finished, and the blocks hold the weights that are kept

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": None if math.isinf(self.best) else self.best}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> _Course:
        best = math.inf if values["best"] is None else values["best"]
        return cls(**{**values, "best": best, "epochs": [Losses(**epoch) for epoch in values["epochs"]]})


class Distiller:
    """Distills a pruned model. The caller calls `train`, then `finish` for every block."""

    def __init__(
        self,
        context: StageContext,
        pruned: PrunedBlocks,
        teacher: Samples,
        settings: DistillSettings,
        scratch: Scratch,
        callbacks: DurableCallbacks,
        *,
        is_resident: bool,
    ) -> None:
        """Prepare the distillation.

        Args:
            context: The model and its N samples.
            pruned: The pruned model.
            teacher: The last block's output in the dense model, N samples (T, H).
            settings: How to train.
            scratch: Space for hidden states and gradients of a batch.
            callbacks: Those of the context; they store the state in parts.
            is_resident: All blocks stay in memory; otherwise one at a time. Changes no bit of the result.
        """
        self._context, self._pruned, self._settings, self._callbacks = context, pruned, settings, callbacks
        self._train_set, self._held_out = split_samples(len(context.inputs), settings.holds_out)
        if settings.holds_out and not self._held_out:
            callbacks.warn("only one sample: none is held out, and distillation is not judged")
        self._num_updates = max(round(len(self._train_set) / settings.batch), 1)  # of an epoch
        self._restored = callbacks.restore()
        self._course = _Course() if self._restored is None else _Course.from_json(self._restored.figures["course"])
        work = _Work(context, pruned, teacher, callbacks, self._boundary, self._advance)
        most = max(math.ceil(len(self._train_set) / self._num_updates), len(self._held_out))
        stored = () if self._restored is None else self._restored.parts
        self._student: _Student = _Resident(work, stored) if is_resident else _Streamed(work, stored, scratch, most)
        per_epoch = len(self._train_set) + len(self._held_out)
        self._total = len(self._held_out) + settings.epochs * per_epoch
        course = self._course
        started = self._restored is not None
        self._done = len(self._held_out) * started + len(course.epochs) * per_epoch
        self._done += sum(len(batch) for batch in self._batches(course.epoch)[: len(course.losses)])

    def train(self) -> Distillation:
        """Train all blocks. Afterwards they hold the best weights.

        Raises:
            NumericalError: The loss is not finite.
        """
        course, student = self._course, self._student
        if self._restored is None:
            course.before = self._judge()
            course.best = math.inf if course.before is None else course.before
        self._restored = None
        while not course.is_over:
            batches = self._batches(course.epoch)
            for batch in batches[len(course.losses) :]:
                loss = student.update(batch, self._rate())
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"distillation: the loss became {loss} in update {len(course.updates) + 1}; use a smaller "
                        f"--distill-lr than {self._settings.lr:g}"
                    )
                course.losses.append(loss)
                course.updates.append(loss)
                self._checkpoint_due()
            self._end_epoch()
        num_held_out = len(self._held_out)
        after = course.best if num_held_out else None
        name = task_named(self._context.model.task).end_loss.name
        return Distillation(
            name, course.before, after, tuple(course.epochs), tuple(course.updates), course.kept_epoch, num_held_out
        )

    @torch.no_grad()
    def finish(self, index: int, dtypes: Mapping[str, torch.dtype]) -> FinishedBlock:
        """A trained block, rounded to `dtypes` and checked. index: from 0.

        Raises:
            NumericalError: A weight is NaN or infinite.
        """
        context = self._context.block(index)
        outcome = self._pruned.outcome_of(index).to(context.device.torch_device)
        state = self._student.weights(index) if self._course.kept_epoch else self._pruned.state_of(index)
        block = context.load(state)
        with kept_masked(context.model, block, index, outcome):
            pass  # leaving it puts quantized weights on their grid
        block.requires_grad_(False)
        return finish_block(context, block, outcome, None, BlockOutput(dtypes), _Quiet())

    def _batches(self, epoch: int) -> list[list[int]]:
        """The samples of each update of an epoch, in a seeded order: an even split."""
        generator = generator_for(self._settings.seed, "distill", epoch)
        order = [self._train_set[i] for i in torch.randperm(len(self._train_set), generator=generator).tolist()]
        ends = [k * len(order) // self._num_updates for k in range(self._num_updates + 1)]
        return [order[start:end] for start, end in itertools.pairwise(ends)]

    def _rate(self) -> float:
        """The learning rate of the next update."""
        total = self._settings.epochs * self._num_updates
        number = len(self._course.updates)
        warm = math.ceil(total * _WARM_UP) if total > 1 else 0
        rising = min(1.0, (number + 1) / (warm + 1))
        falling = 0.5 * (1 + math.cos(math.pi * number / total))
        return self._settings.lr * self._course.rate * rising * falling

    def _judge(self) -> float | None:
        """The mean loss over the held-out samples; None: there are none."""
        if not self._held_out:
            return None
        losses = self._student.losses(self._held_out)
        mean = math.fsum(losses) / len(losses)
        if not math.isfinite(mean):
            raise NumericalError(
                f"distillation: the held-out loss is {mean} after {len(self._course.updates)} updates; use a smaller "
                f"--distill-lr than {self._settings.lr:g}"
                if self._course.updates
                else f"distillation: the loss of the pruned model is {mean}: its weights or activations hold NaN or "
                "infinity"
            )
        return mean

    def _end_epoch(self) -> None:
        """Keep the epoch's weights, or undo them if the held-out loss did not fall (Adam's moments stay)."""
        course, is_last = self._course, self._course.epoch == self._settings.epochs
        held_out = self._judge()
        if held_out is None or held_out < course.best:
            course.best = math.inf if held_out is None else held_out
            course.kept_epoch = course.epoch
            if held_out is not None and not is_last:
                self._student.save_best()
        else:
            course.rate *= BACKTRACK
            self._student.restore_best()
        course.epochs.append(Losses(math.fsum(course.losses) / len(course.losses), held_out))
        course.losses = []
        course.epoch += 1
        course.is_over = is_last
        self._checkpoint_due()

    def _checkpoint_due(self) -> None:
        """An update is finished."""
        self._student.checkpoint(self._checkpoint)

    def _boundary(self) -> None:
        """Between samples the state is that of the last finished update: gradients alone have been added up."""
        if self._restored is None and self._course.updates:
            self._student.stop_or_checkpoint(self._checkpoint)
        else:
            self._callbacks.check_stop()

    def _advance(self, loss: float) -> None:
        self._done += 1
        self._callbacks.report(self._done, self._total, "samples", loss=loss, epoch=self._course.epoch)

    def _checkpoint(self) -> Checkpoint:
        self._student.store()
        return Checkpoint(figures={"course": self._course.to_json()}, parts=tuple(self._student.parts))


class _Work:
    """The model, its samples and the loss, for either student. The arithmetic is here, and so is the same for both."""

    def __init__(
        self,
        context: StageContext,
        pruned: PrunedBlocks,
        teacher: Samples,
        callbacks: DurableCallbacks,
        boundary: Callable[[], None],
        advance: Callable[[float], None],
    ) -> None:
        # Gradients of half-precision floats underflow without a scaler, which would have to know those of all blocks.
        choices = context.device
        if choices.torch_dtype == torch.float16:
            choices = replace(choices, dtype="float32")
        if choices.torch_train_dtype == torch.float16:
            choices = replace(choices, train_dtype="float32")
        self.context, self.choices = replace(context, device=choices), choices
        self.model, self.device, self.callbacks = context.model, choices.torch_device, callbacks
        self.pruned, self.boundary, self.advance = pruned, boundary, advance
        self._teacher = teacher
        self._end_loss: type[EndLoss] = task_named(context.model.task).end_loss

    def inputs(self, number: int) -> Tensor:
        """The model's input of a sample, as a batch of one."""
        return self.context.inputs[number][None].to(self.device)

    @torch.no_grad()
    def enter(self, ends: Ends, inputs: Tensor) -> Tensor:
        """The input of block 0, (1, T, H)."""
        with computing(self.choices):
            return ends.enter(inputs).hidden.to(self.choices.torch_dtype)

    def load(self, index: int, tensors: Mapping[str, Tensor] | None) -> _Block:
        """A block, ready to be trained. tensors: weights and moments; None: the pruned block, without moments."""
        state = self.pruned.state_of(index) if tensors is None else without_moments(tensors)
        return _Block(self.context.block(index), state, self.pruned.outcome_of(index), tensors)

    def run(self, block: _Block, hidden: Tensor, inputs: Tensor, *, trains: bool) -> Tensor:
        """The block's output (1, T, H) in fp32. trains: with the arithmetic of training steps."""
        call = self.model.calls(self.device).of(inputs, self.choices)[block.index]
        forward = block.runner.training_forward if trains else block.runner.forward
        return forward(hidden, call).float()

    def end(self, ends: Ends, number: int, hidden: Tensor, *, needs_gradient: bool) -> LossAndGradient:
        """The loss of a sample. hidden: the last block's output, (1, T, H)."""
        target = self._teacher[number][None].to(self.device)
        vocabulary = self.model.vocab_size
        return self._end_loss.of(ends, self.inputs(number), hidden, target, vocabulary, needs_gradient=needs_gradient)


class _Block:
    """A block on the device with its masks in force, and Adam."""

    def __init__(
        self,
        context: BlockContext,
        state: Mapping[str, Tensor],
        outcome: PruneOutcome,
        moments: Mapping[str, Tensor] | None,
    ) -> None:
        self.index = context.index
        self._module = context.load(state)
        outcome = outcome.to(context.device.torch_device)
        self._masking = contextlib.ExitStack()
        self._masking.enter_context(kept_masked(context.model, self._module, self.index, outcome))
        self.adam = KeptAdam(self._module, kept_of(context.model, self.index, outcome))
        if moments is not None:
            self.adam.load(moments)
        self.runner = context.runner(self._module)

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


class _Student(ABC):
    """The pruned model while it is trained."""

    def __init__(self, work: _Work, stored: Collection[str]) -> None:
        """Begin. stored: parts of the checkpoint from which the work is resumed; empty: begin with the pruned model."""
        self._work = work
        self._num_blocks = work.model.num_blocks
        self._has_best = _best(0) in stored

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
        """Stop between two samples of an update, if requested."""

    @property
    def parts(self) -> list[str]:
        """Names of what a checkpoint needs."""
        kinds = (_current, _best) if self._has_best else (_current,)
        return [kind(index) for kind in kinds for index in range(self._num_blocks)]

    def save_best(self) -> None:
        """Store the weights as the best so far."""
        for index in range(self._num_blocks):
            self._work.callbacks.keep(_best(index), self.weights(index))
        self._has_best = True

    def restore_best(self) -> None:
        """Return to the best weights so far: those stored, or those of the pruned model."""
        for index in range(self._num_blocks):
            best = self._work.callbacks.kept(_best(index)) if self._has_best else self._work.pruned.state_of(index)
            self._set_weights(index, best)


class _Resident(_Student):
    """All blocks are in memory. A sample's activations are kept from its forward to its backward pass."""

    def __init__(self, work: _Work, stored: Collection[str]) -> None:
        super().__init__(work, stored)
        self._blocks = [
            work.load(index, work.callbacks.kept(_current(index)) if stored else None)
            for index in range(self._num_blocks)
        ]
        self._ends = work.model.load_ends(work.device, "all")

    def update(self, numbers: Sequence[int], lr: float) -> float:
        work, losses = self._work, []
        for number in numbers:
            work.boundary()
            inputs = work.inputs(number)
            hidden, passed = work.enter(self._ends, inputs), []
            for block in self._blocks:
                leaf = hidden.float().requires_grad_()
                out = work.run(block, leaf, inputs, trains=True)
                passed.append((leaf, out))
                hidden = out.detach().to(work.choices.torch_dtype)
            loss, gradient = work.end(self._ends, number, hidden, needs_gradient=True)
            assert gradient is not None
            gradient /= len(numbers)
            while passed:
                leaf, out = passed.pop()
                gradient = _backward(leaf, out, gradient)
            losses.append(loss)
            work.advance(loss)
        for block in reversed(self._blocks):
            block.adam.step(lr)
        return math.fsum(losses) / len(losses)

    @torch.no_grad()
    def losses(self, numbers: Sequence[int]) -> list[float]:
        work, losses = self._work, []
        for number in numbers:
            work.boundary()
            inputs = work.inputs(number)
            hidden = work.enter(self._ends, inputs)
            for block in self._blocks:
                hidden = work.run(block, hidden.float(), inputs, trains=False).to(work.choices.torch_dtype)
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


class _Streamed(_Student):
    """One block is in memory. Hidden states between blocks, and weights and moments of the others, are stored."""

    def __init__(self, work: _Work, stored: Collection[str], scratch: Scratch, most_samples: int) -> None:
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
        self._forward(numbers, is_kept=True)
        ends = work.model.load_ends(work.device, "leave")
        losses = []
        for place, number in enumerate(numbers):
            work.boundary()
            hidden = self._read(self._hidden, self._place(self._num_blocks, place))
            loss, gradient = work.end(ends, number, hidden, needs_gradient=True)
            assert gradient is not None
            self._gradients.write(place, (gradient / len(numbers))[0])
            losses.append(loss)
        del ends
        for index in reversed(range(self._num_blocks)):
            block = self._load(index)
            for place, number in enumerate(numbers):
                work.boundary()
                leaf = self._read(self._hidden, self._place(index, place)).float().requires_grad_()
                out = work.run(block, leaf, work.inputs(number), trains=True)
                gradient = _backward(leaf, out, self._read(self._gradients, place))
                self._gradients.write(place, gradient[0])
            block.adam.step(lr)
            work.callbacks.keep(_current(index), block.tensors())
            del block
        self._is_trained = True
        for loss in losses:
            work.advance(loss)
        return math.fsum(losses) / len(losses)

    @torch.no_grad()
    def losses(self, numbers: Sequence[int]) -> list[float]:
        work = self._work
        self._forward(numbers, is_kept=False)
        ends = work.model.load_ends(work.device, "leave")
        losses = []
        for place, number in enumerate(numbers):
            work.boundary()
            hidden = self._read(self._hidden, self._place(0, place))
            losses.append(work.end(ends, number, hidden, needs_gradient=False).value)
            work.advance(losses[-1])
        return losses

    def _forward(self, numbers: Sequence[int], *, is_kept: bool) -> None:
        """Pass samples through all blocks. is_kept: every block's input is, not only the last output."""
        work = self._work
        ends = work.model.load_ends(work.device, "enter")
        for place, number in enumerate(numbers):
            work.boundary()
            self._hidden.write(self._place(0, place), work.enter(ends, work.inputs(number))[0])
        del ends
        for index in range(self._num_blocks):
            block = self._load(index)
            for place, number in enumerate(numbers):
                work.boundary()
                source = self._place(index if is_kept else 0, place)
                # Gradients are enabled in training as they are when the block is resident.
                leaf = self._read(self._hidden, source).float().requires_grad_(is_kept)
                out = work.run(block, leaf, work.inputs(number), trains=is_kept).detach()
                self._hidden.write(self._place(index + 1 if is_kept else 0, place), out[0])
            del block

    def _place(self, index: int, place: int) -> int:
        """Where the input of block `index` of a sample of the batch lies."""
        return index * self._most + place

    def _read(self, stream: Samples, place: int) -> Tensor:
        return stream[place][None].to(self._work.device)

    def _load(self, index: int) -> _Block:
        return self._work.load(index, self._work.callbacks.kept(_current(index)) if self._is_trained else None)

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


def _backward(leaf: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    """Add up a block's gradients, and return that of its input, (1, T, H). gradient: of the block's output."""
    out.backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


def _current(index: int) -> str:
    return f"block-{index:05d}"


def _best(index: int) -> str:
    return f"best-{index:05d}"


class _Quiet:
    """`stages.finish_block.Progress` of work that is too short to show."""

    def boundary(self) -> None:
        """Do nothing."""

    def advance(self, count: int = 1, /) -> None:
        """Do nothing."""
