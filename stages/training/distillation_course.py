"""The course of a distillation: how far it is, which samples and learning rate come next, and how many passes in all.

An update takes a batch; an epoch takes each sample once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stages.training.rate_search import USUAL_TRIALS, Trial
from stages.training.seeding import generator_for
from stages.training.trainer import Losses

# Share of the updates in which the learning rate rises to its full value.
_WARM_UP = 1 / 15


@dataclass
class Course:
    """State without weights and moments, after the last finished update. Field names are part of the checkpoints."""

    before: float | None = None
    peak: float | None = None  # the highest learning rate; None: not found yet
    trials: list[Trial] = field(default_factory=list)
    epoch: int = 1  # the current one
    losses: list[float] = field(default_factory=list)  # of the epoch's updates so far
    epochs: list[Losses] = field(default_factory=list)  # of the finished epochs
    updates: list[float] = field(default_factory=list)
    best: float = math.inf  # the lowest held-out loss so far
    kept_epoch: int = 0
    rate: float = 1.0  # factor of the learning rate after backtracking
    beginning: int = 0  # finished epochs when the schedule of the learning rate began
    is_over: bool = False  # every epoch is finished, and the blocks hold the weights that are kept
    rounded: float | None = None  # the held-out loss of those weights in the export dtypes; None: not measured

    def to_json(self) -> dict[str, Any]:
        trials = [[trial.distance, None if math.isinf(trial.loss) else trial.loss] for trial in self.trials]
        return {**asdict(self), "best": None if math.isinf(self.best) else self.best, "trials": trials}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Course:
        best = math.inf if values["best"] is None else values["best"]
        trials = [Trial(distance, math.inf if loss is None else loss) for distance, loss in values.get("trials", ())]
        epochs = [Losses(**epoch) for epoch in values["epochs"]]
        return cls(**{**values, "best": best, "trials": trials, "epochs": epochs})


class Schedule:
    """Which samples each update takes, and its learning rate: it rises, then falls to zero along a cosine."""

    def __init__(self, train_set: Sequence[int], epochs: int, batch: int, seed: int) -> None:
        """Plan the updates.

        Args:
            train_set: Numbers of the samples to train on.
            epochs: After which the rate has fallen to zero.
            batch: Samples of an update, about: an epoch's samples are split evenly.
            seed: Of their order.
        """
        self._train_set, self._epochs, self._seed = train_set, epochs, seed
        self._num_updates = max(round(len(train_set) / batch), 1)  # of an epoch

    @property
    def largest_batch(self) -> int:
        """Samples of the largest batch."""
        return math.ceil(len(self._train_set) / self._num_updates)

    def batches(self, epoch: int) -> list[list[int]]:
        """The samples of each update of an epoch, in a seeded order. epoch: from 1."""
        generator = generator_for(self._seed, "distill", epoch)
        order = [self._train_set[i] for i in torch.randperm(len(self._train_set), generator=generator).tolist()]
        ends = [k * len(order) // self._num_updates for k in range(self._num_updates + 1)]
        return [order[start:end] for start, end in itertools.pairwise(ends)]

    def rate(self, course: Course) -> float:
        """The learning rate of the next update. course: with its highest rate."""
        total = self._epochs * self._num_updates
        number = len(course.updates) - course.beginning * self._num_updates
        warm = math.ceil(total * _WARM_UP) if total > 1 else 0
        rising = min(1.0, (number + 1) / (warm + 1))
        falling = 0.5 * (1 + math.cos(math.pi * number / total))
        assert course.peak is not None
        return course.peak * course.rate * rising * falling


class PassCount:
    """Passes of a sample through a block or the head: those that are done, and those of the whole distillation."""

    def __init__(
        self, num_blocks: int, num_train: int, num_held_out: int, epochs: int, report: Callable[[int, int], None]
    ) -> None:
        """Count nothing yet.

        Args:
            num_blocks: Of the model.
            num_train: Samples of an epoch.
            num_held_out: Samples of a judgement.
            epochs: That are planned.
            report: Called with done and total after each pass.
        """
        self._of_sample = 2 * num_blocks + 1  # forward and backward
        self._judging = num_held_out * (num_blocks + 1)
        self._epoch = num_train * self._of_sample + self._judging
        self._epochs, self._report = epochs, report
        self._done = self._total = 0

    def begin(self, course: Course, schedule: Schedule, *, is_restored: bool) -> None:
        """Take over what is done. is_restored: by a distillation before this one."""
        num_judged = 1 + USUAL_TRIALS * (course.peak is None) + len(course.trials)
        self._total = num_judged * self._judging + (course.beginning + self._epochs) * self._epoch
        self._done = num_judged * is_restored * self._judging + len(course.epochs) * self._epoch
        self._done += self._of_sample * sum(map(len, schedule.batches(course.epoch)[: len(course.losses)]))

    def add_judgements(self, number: int) -> None:
        """Expect more judgements than planned. number: how many; below zero: fewer."""
        self._total += number * self._judging

    def add_epochs(self) -> None:
        """All epochs will be done once more."""
        self._total += self._epochs * self._epoch

    def advance(self) -> None:
        """A pass is done."""
        self._done += 1
        self._report(self._done, self._total)
