"""Train one block by Adam so that its output on the biased stream matches a target stream.

Compensation (LAMP Eq. 9) trains a dense block, refinement a pruned block; both use this trainer. It can make a
`Checkpoint` at every batch boundary and resume from it to bit-identical weights.

N: samples.    T: tokens of a sample.    H: hidden size.    The batch size is one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.interfaces import Checkpoint, Samples, Scratch, Stream
from stages.machine.device import reproducible
from stages.runtime.block_context import BlockContext
from stages.training.best_weights import BestWeights
from stages.training.kept_weights import plain_name
from stages.training.loss import block_loss, split_samples
from stages.training.rates import Rate
from stages.training.seeding import generator_for

# After an epoch without improvement, training resumes from the best weights, and the learning rate is multiplied by
# this (docs/experiments.md).
BACKTRACK = 0.35


@dataclass(frozen=True)
class TrainingSettings:
    """How to train."""

    epochs: int
    lr: Rate
    lr_decay: float  # the learning rate is multiplied by this after each epoch
    # Measure each epoch on held-out samples; undo an epoch without improvement and reduce the learning rate. False: as
    # in the paper, train on all samples and keep the last weights.
    holds_out: bool
    seed: int
    loss: str = "mse"  # "mse" (as in the paper) or "token" (each token's error relative to its target)


@dataclass(frozen=True)
class Losses:
    """Mean losses of a block's weights.

    Attributes:
        trained: Over the training samples. Before and after a training it is computed only if no sample is held out:
            each takes a forward pass of every sample.
        held_out: Over the held-out samples; None: there are none.
    """

    trained: float | None
    held_out: float | None

    @property
    def judged(self) -> float:
        """The loss that decides: over the held-out samples, else over the training samples."""
        found = self.trained if self.held_out is None else self.held_out
        assert found is not None
        return found


@dataclass(frozen=True)
class Training:
    """Training report of one block."""

    before: Losses
    after: Losses
    epoch_losses: tuple[Losses, ...]  # `trained` is the mean over the epoch's own steps
    num_steps: int
    kept_epoch: int  # the epoch whose weights were kept, from 1; 0: no epoch improved the block


@dataclass
class _TrainingState:
    """Training state without weights and optimizer. The field names are part of the checkpoint format."""

    epoch: int = 1  # the current one
    losses: dict[int, float] = field(default_factory=dict)  # of the epoch's steps so far, by sample, in their order
    epochs: list[Losses] = field(default_factory=list)  # of the finished epochs
    best: float = math.inf  # the lowest judged loss so far
    kept_epoch: int = 0
    rate: float = 1.0  # factor of the learning rate after backtracking
    is_over: bool = False  # every epoch is finished, and the block holds the best weights

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "losses": list(self.losses.items())}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> _TrainingState:
        losses = {int(index): loss for index, loss in values["losses"]}
        return cls(**{**values, "losses": losses, "epochs": [Losses(**epoch) for epoch in values["epochs"]]})


@dataclass(frozen=True)
class Purpose:
    """The stage that trains a block."""

    name: str  # "compensate" or "refine"; part of the seed of the sample order
    passes_before: int  # passes over all samples before the training steps, judging apart: for the progress
    passes_after: int  # passes over all samples after them


class BlockTrainer:
    """Trains a block in place. The caller calls `first_pass`, then `train`.

    After `train`, the caller calls `boundary` before each micro-batch of its own passes.
    """

    def __init__(
        self,
        context: BlockContext,
        block: nn.Module,
        stream_in: Samples,
        targets: Stream,
        settings: TrainingSettings,
        purpose: Purpose,
        spill: Scratch | None = None,
    ) -> None:
        """Prepare the training.

        Args:
            context: The block and its N samples.
            block: The module to train, fp32, on the device.
            stream_in: The block's input of each sample, (T, H).
            targets: The target output of each sample, (T, H); `first_pass` may write them.
            settings: Epochs, learning rate, loss.
            purpose: The stage that trains the block.
            spill: Scratch space for the best weights so far; None: they stay in memory.
        """
        inputs, callbacks = context.inputs, context.callbacks
        self.block, self.block_index = block, context.index
        self.inputs, self.stream_in, self.targets = inputs, stream_in, targets
        self.settings, self.choices, self.callbacks, self.purpose = settings, context.device, callbacks, purpose.name
        self.device = context.device.torch_device
        self._pass = context.runner(block)
        self._spill = spill
        self.train_set, self.held_out = split_samples(len(inputs), settings.holds_out)
        if settings.holds_out and not self.held_out and settings.epochs:
            callbacks.warn("only one calibration sample: none is held out, training is judged on the sample itself")
        num_steps = settings.epochs * len(self.train_set)
        self._num_after = purpose.passes_after * len(inputs)
        self._total = purpose.passes_before * len(inputs) + self._num_judging + num_steps + self._num_after
        self._done = 0  # of `_total`
        self._restored = callbacks.restore() if settings.epochs else None
        self._before: Losses | None = None
        self._course: _TrainingState | None = None  # None: before training
        self._optimizer: torch.optim.Adam | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._best: BestWeights | None = None
        self._ended: Checkpoint | None = None

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Report that `count` more samples are done, with metrics to show."""
        self._done += count
        self.callbacks.report(self._done, self._total, "samples", **metrics)

    def boundary(self) -> None:
        """Mark a batch boundary: the stage may stop or make a checkpoint here."""
        if self._ended is not None:
            ended = self._ended
            self.callbacks.checkpoint(lambda: ended)
        elif self._course is not None:
            self.callbacks.checkpoint(self._checkpoint)
        else:
            self.callbacks.check_stop()

    @torch.no_grad()
    def first_pass(self, makes_targets_of: Samples | None = None) -> Losses:
        """Compute the mean loss before training, of the samples that judge. When resumed, the checkpoint has it.

        Args:
            makes_targets_of: First write the targets, the untrained block's output of this stream of N samples (T, H).
                None: the targets exist.
        """
        if makes_targets_of is not None:
            self._pass.propagate(makes_targets_of, self.targets, self.callbacks.check_stop, self.advance)
        if self._restored is not None:
            self._before = Losses(**self._restored.figures["before"])
        else:
            self._before = self._losses_now(self.callbacks.check_stop)
        return self._before

    @property
    def _num_judging(self) -> int:
        return len(self.held_out) or len(self.train_set)

    def _losses_now(self, boundary: Callable[[], None]) -> Losses:
        """The losses of the block as it is, of the samples that judge it."""
        if self.held_out:
            return Losses(None, _mean(self._losses(self.held_out, boundary), self.held_out))
        return Losses(_mean(self._losses(self.train_set, boundary), self.train_set), None)

    @torch.no_grad()
    def _losses(self, indices: Sequence[int], boundary: Callable[[], None]) -> dict[int, float]:
        """The current loss of each of the samples `indices`."""
        values: dict[int, float] = {}
        with self._pass.reading(self._pass.batches(indices), self.stream_in, self.targets) as read:
            for batch in read:
                boundary()
                hidden = self._pass.forward(batch.samples[0], batch.call)
                targets = batch.samples[1]
                for k, number in enumerate(batch.numbers):
                    loss = block_loss(hidden[k : k + 1], targets[k : k + 1], self.settings.loss)
                    values[number] = loss.item()
                if self._course is None:
                    self.advance(len(batch.numbers))
        return values

    def train(self, parameters: Sequence[nn.Parameter]) -> Training:
        """Train `parameters` of the block, after `first_pass`. Afterwards the block holds the best weights.

        Raises:
            NumericalError: The loss is not finite.
        """
        before = self._before
        assert before is not None, "there was no first pass"
        if not math.isfinite(before.judged):
            raise NumericalError(
                f"block {self.block_index}: the loss is {before.judged} before any training: the model's weights or "
                "activations hold NaN or infinity"
            )
        if not self.settings.epochs:
            return Training(before, before, (), 0, 0)
        course = self._begin(before, parameters)
        while not course.is_over:
            with reproducible(self.device):
                self._train_epoch(course)
            self._judge_epoch(course, parameters)
        self._optimizer = self._best = None
        after = before
        if course.kept_epoch:
            # The held-out loss of the epoch that was kept is known.
            after = Losses(None, course.best) if self.held_out else self._losses_now(self.boundary)
        if not math.isfinite(after.judged):  # the last update came after the last computed loss
            raise NumericalError(
                f"block {self.block_index}: the loss is {after.judged} after training; {self._advice()}"
            )
        if self._num_after:  # the caller changes the block from now on
            ended = self._checkpoint()
            self._ended = Checkpoint({name: tensor.clone() for name, tensor in ended.tensors.items()}, ended.figures)
        num_steps = len(course.epochs) * len(self.train_set)
        return Training(before, after, tuple(course.epochs), num_steps, course.kept_epoch)

    def _begin(self, before: Losses, parameters: Sequence[nn.Parameter]) -> _TrainingState:
        """Prepare the optimizer and the state, from the checkpoint if there is one."""
        if self.settings.holds_out:
            self._best = BestWeights(self.block, self._spill)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.Adam(self._groups(parameters), fused=True)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.choices.torch_train_dtype == torch.float16)
        self._course = _TrainingState(best=before.judged)
        if self._restored is not None:
            self._resume(self._restored, parameters)
            self._restored = None
        if self._course.is_over:
            _freeze(parameters)
        return self._course

    def _groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """One group per parameter, because each has a learning rate of its own. The block is as before training."""
        named = {plain_name(name): parameter for name, parameter in self.block.named_parameters()}
        factors, names = self.settings.lr.factors(named), {parameter: name for name, parameter in named.items()}
        return [{"params": [parameter], "factor": factors[names[parameter]]} for parameter in parameters]

    def _train_epoch(self, course: _TrainingState) -> None:
        """Train on each training sample once, in a seeded order; a resumed epoch trains on the remaining samples."""
        assert self._optimizer is not None
        assert self._scaler is not None
        generator = generator_for(self.settings.seed, self.purpose, self.block_index, course.epoch)
        order = [self.train_set[i] for i in torch.randperm(len(self.train_set), generator=generator).tolist()]
        rate = self.settings.lr.value * self.settings.lr_decay ** (course.epoch - 1) * course.rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        steps = [[index] for index in order[len(course.losses) :]]
        with self._pass.reading(steps, self.stream_in, self.targets) as read:
            for batch in read:
                self.boundary()
                hidden, target = batch.samples
                loss = block_loss(self._pass.training_forward(hidden, batch.call), target, self.settings.loss)
                self._scaler.scale(loss).backward()
                self._scaler.step(self._optimizer)
                self._scaler.update()
                # Free the gradients now: the next forward pass needs the memory.
                self._optimizer.zero_grad(set_to_none=True)
                value = loss.item()  # waits for the GPU, after the whole step has been queued
                if not math.isfinite(value):
                    raise NumericalError(
                        f"block {self.block_index}: the loss became {value} in epoch {course.epoch}; {self._advice()}"
                    )
                course.losses[batch.numbers[0]] = value
                self.advance(loss=value, epoch=course.epoch)

    def _judge_epoch(self, course: _TrainingState, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the epoch's weights, or undo them if nothing improved (Adam's moments stay); start the next epoch."""
        held_out = self._mean_loss(self.held_out) if self.held_out else None
        if self.settings.holds_out:
            # The losses of the epoch's steps cannot judge it: each was computed before its update.
            judged = held_out if held_out is not None else self._mean_loss(self.train_set)
            assert self._best is not None
            if judged < course.best:
                course.best, course.kept_epoch = judged, course.epoch
                self._best.save()
            else:
                course.rate *= BACKTRACK
                self._best.restore()
        else:
            course.kept_epoch = course.epoch
        course.epochs.append(Losses(_mean(course.losses, [*course.losses]), held_out))
        course.losses = {}
        course.epoch += 1
        if course.epoch > self.settings.epochs:
            course.is_over = True
            _freeze(parameters)

    def _checkpoint(self) -> Checkpoint:
        course, before = self._course, self._before
        assert course is not None
        assert before is not None
        tensors = {f"block.{name}": tensor for name, tensor in self.block.state_dict().items()}
        if self._best is not None and course.kept_epoch and not course.is_over:
            tensors.update((f"best.{name}", tensor) for name, tensor in self._best.tensors().items())
        if self._optimizer is not None and not course.is_over:
            for number, state in self._optimizer.state_dict()["state"].items():
                tensors.update((f"adam.{number}.{name}", value) for name, value in state.items())
        done = min(self._done, self._total - self._num_after)
        figures: dict[str, Any] = {"before": asdict(before), "course": course.to_json(), "done": done}
        if self._scaler is not None:
            figures["scaler"] = self._scaler.state_dict()
        return Checkpoint(tensors, figures)

    def _resume(self, checkpoint: Checkpoint, parameters: Sequence[nn.Parameter]) -> None:
        """Restore everything from a checkpoint. The block holds the weights from before training."""
        assert self._optimizer is not None
        assert self._scaler is not None
        tensors, figures = checkpoint.tensors, checkpoint.figures
        self._course = _TrainingState.from_json(figures["course"])
        self._done = figures["done"]
        self._scaler.load_state_dict(figures["scaler"])
        best = _named(tensors, "best.")
        if best and self._best is not None:
            self._best.set(best)
        self.block.load_state_dict(_named(tensors, "block."))
        for number, parameter in enumerate(parameters):
            state = _named(tensors, f"adam.{number}.")
            if state:
                self._optimizer.state[parameter] = {name: tensor.to(self.device) for name, tensor in state.items()}

    def _advice(self) -> str:
        flag = "--refine-lr" if self.purpose == "refine" else "--lr"
        return f"use a smaller {flag} than {self.settings.lr}"

    def _mean_loss(self, indices: Sequence[int]) -> float:
        return _mean(self._losses(indices, self.boundary), indices)


def _freeze(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _mean(losses: Mapping[int, float], indices: Sequence[int]) -> float:
    return math.fsum(losses[i] for i in indices) / len(indices)
