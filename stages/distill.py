"""Distill the pruned model towards the dense one, all blocks together, with the pruning masks fixed.

    minimize  loss(head(B^n(...B^1(z^0))), head(dense output))   over the kept weights, biases and norms of the blocks

Local targets cannot undo the error that has piled up in the residual stream; the end loss (`stages.training.end_loss`)
has to undo only what the output sees. The paper has no such step. The dense model's last hidden states are computed
before; what is outside the blocks does not change.

An update takes a batch of B samples:

    forward     for each block: its input of every sample of the batch is kept, and passed through it
    head        the loss, and its gradient with respect to the last block's output
    backward    for each block, from the last: its gradient, recomputed from its input, and a step of Adam

Unless its learning rate is given, the first update is also a search for it (`stages.training.rate_search`): the weights
go to several distances along the first step of Adam, and the held-out loss is measured at each.

Streamed, one block is in memory at a time, and its weights and moments are stored after every update. Resident, all are
in memory, and no block runs twice. Both do the same arithmetic in the same order: the weights are bit-identical.

N: samples.    B: samples of a batch.    T: tokens of a sample.    H: hidden size.    n: blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stages.errors import NumericalError
from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Checkpoint, DurableCallbacks, Samples, Scratch
from stages.machine.device import reproducible
from stages.runtime.block_context import BlockOutput, StageContext
from stages.runtime.sample_views import JoinedSamples
from stages.tasks.registry import task_named
from stages.training.distillation_course import Course, PassCount, Schedule
from stages.training.distillation_work import Block, PrunedBlocks, Work
from stages.training.end_loss import EndLoss
from stages.training.kept_weights import kept_masked
from stages.training.loss import split_samples
from stages.training.rate_search import USUAL_TRIALS, Trial, search
from stages.training.rates import Rate
from stages.training.student import Resident, Streamed, Student
from stages.training.trainer import BACKTRACK, Losses

# Where no epoch improved the model, distillation begins again at a smaller rate, unless this many epochs have failed.
_MOST_FAILURES = 3

# The search begins at this share of each tensor's root mean square, and the highest learning rate is this many times
# what it finds (docs/experiments.md).
_FIRST_TRIAL, _PEAK = 1e-3, 3.0
# Before any update, no rate is to blame.
_BROKEN = "distillation: the loss of the pruned model is {}: its weights or activations hold NaN or infinity"
# Without held-out samples, or where they tell nothing: this rate at a batch of one sample, times the root of the batch.
_UNJUDGED = 8e-4


@dataclass(frozen=True)
class DistillSettings:
    """How to distill."""

    epochs: int
    # The highest learning rate of Adam: it rises, then falls to zero along a cosine. None: it is searched for.
    lr: Rate | None
    batch: int  # samples of an update, about: an epoch's samples are split evenly
    # Measure each epoch on held-out samples; undo an epoch without improvement, and if none improved the model, begin
    # again at a smaller rate. False: train on all samples, and keep the last weights.
    holds_out: bool
    seed: int


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples that the dense model generated, to train on beside the given ones: none of them is held out."""

    samples: Samples  # the model's input
    targets: Samples  # the last block's output in the dense model, (T, H) each


@dataclass(frozen=True)
class Teaching:
    """What the dense model gives to train towards."""

    targets: Samples  # the last block's output in the dense model on the given samples, (T, H) each
    generated: GeneratedSamples | None = None


@dataclass(frozen=True)
class Distillation:
    """Report of a distillation."""

    loss: str  # name of the end loss
    lr: Rate  # the highest learning rate
    trials: tuple[Trial, ...]  # of the search for it, as shares of each tensor's root mean square
    before: float | None  # on the held-out samples; None: there are none
    after: float | None
    epochs: tuple[Losses, ...]  # `trained` is the mean over the epoch's updates, each before it took effect
    updates: tuple[float, ...]  # the mean loss of each batch, before its update
    kept_epoch: int  # the epoch whose weights were kept, from 1; 0: no epoch improved the model
    num_held_out: int


class Distiller:
    """Distills a pruned model. The caller calls `train`, then `finish` for every block."""

    def __init__(
        self,
        context: StageContext,
        pruned: PrunedBlocks,
        teaching: Teaching,
        settings: DistillSettings,
        scratch: Scratch,
        callbacks: DurableCallbacks,
        *,
        is_resident: bool,
    ) -> None:
        """Prepare the distillation.

        Args:
            context: The model and N given samples.
            pruned: The pruned model.
            teaching: What to train towards.
            settings: How to train.
            scratch: Space for hidden states and gradients of a batch.
            callbacks: Those of the context; they store the state in parts.
            is_resident: All blocks stay in memory; otherwise one at a time. Changes no bit of the result.
        """
        self._train_set, self._held_out = split_samples(len(context.inputs), settings.holds_out)
        teacher, more = teaching.targets, teaching.generated
        if more is not None:
            first = len(context.inputs)
            self._train_set += range(first, first + len(more.samples))
            context = replace(context, inputs=JoinedSamples((context.inputs, more.samples)))
            teacher = JoinedSamples((teacher, more.targets))
        self._context, self._pruned, self._settings, self._callbacks = context, pruned, settings, callbacks
        self._end_loss: type[EndLoss] = task_named(context.model.task).end_loss
        if settings.holds_out and not self._held_out:
            callbacks.warn("only one sample: none is held out, and distillation is not judged")
        self._schedule = Schedule(self._train_set, settings.epochs, settings.batch, settings.seed)
        self._restored = callbacks.restore()
        self._course = Course() if self._restored is None else Course.from_json(self._restored.figures["course"])
        if settings.lr is None:
            self._lr = Rate(1.0, is_relative=True)
            if not self._held_out:
                self._course.peak = self._unjudged_peak
        else:
            self._lr, self._course.peak = Rate(1.0, settings.lr.is_relative), settings.lr.value
        work = self._work = Work(context, pruned, teacher, self._end_loss, self._lr, callbacks, self)
        self._scratch = scratch
        most = max(self._schedule.largest_batch, len(self._held_out))
        stored = () if self._restored is None else self._restored.parts
        self._student: Student = Resident(work, stored) if is_resident else Streamed(work, stored, scratch, most)
        self._shown: dict[str, float] = {}  # with the progress, from the last sample
        self._passes = PassCount(
            context.model.num_blocks, len(self._train_set), len(self._held_out), settings.epochs, self._report
        )
        self._passes.begin(self._course, self._schedule, is_restored=self._restored is not None)

    def train(self) -> Distillation:
        """Train all blocks. Afterwards they hold the best weights.

        Raises:
            NumericalError: The loss is not finite.
        """
        course = self._course
        if self._restored is None:
            course.before = self._judge()
            course.best = math.inf if course.before is None else course.before
        self._restored = None
        while not course.is_over:
            batches = self._schedule.batches(course.epoch)
            for batch in batches[len(course.losses) :]:
                loss = self._update(batch)
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"distillation: the loss became {loss} in update {len(course.updates) + 1}; {self._advice()}"
                        if course.updates
                        else _BROKEN.format(loss)
                    )
                course.losses.append(loss)
                course.updates.append(loss)
                self._checkpoint_due()
            self._end_epoch()
        self._judge_rounded()
        num_held_out = len(self._held_out)
        after = (course.best if course.rounded is None else course.rounded) if num_held_out else None
        assert course.peak is not None
        return Distillation(
            self._end_loss.name,
            Rate(course.peak, self._lr.is_relative),
            tuple(course.trials),
            course.before,
            after,
            tuple(course.epochs),
            tuple(course.updates),
            course.kept_epoch,
            num_held_out,
        )

    @torch.no_grad()
    def finish(self, index: int) -> FinishedBlock:
        """A trained block, rounded to its export dtypes and checked. index: from 0.

        Raises:
            NumericalError: A weight is NaN or infinite.
        """
        context = self._context.block(index)
        outcome = self._pruned.outcome_of(index).to(context.device.torch_device)
        state = self._student.weights(index) if self._course.kept_epoch else self._work.start(index)
        block = context.load(state)
        with kept_masked(context.model, block, index, outcome):
            pass  # leaving it puts quantized weights on their grid
        block.requires_grad_(False)
        return finish_block(context, block, outcome, None, BlockOutput(self._pruned.dtypes_of(index)), _Quiet())

    def _judge_rounded(self) -> None:
        """Measure the kept weights as they are exported; if rounding undid what was learnt, keep the pruned ones."""
        course, dtypes_of = self._course, self._pruned.dtypes_of
        num_blocks = self._context.model.num_blocks
        is_exact = all(dtype == torch.float32 for index in range(num_blocks) for dtype in dtypes_of(index).values())
        if is_exact or not (course.kept_epoch and self._held_out):
            return
        if course.rounded is None:
            self._passes.add_judgements(1)
            room = self._scratch.stream(
                "rounded", len(self._held_out), self._context.hidden_shape, self._work.choices.torch_dtype
            )
            found = self._work.losses(self._held_out, self._finished, room, self._student.ends)
            course.rounded = _mean(found)
            self._checkpoint_due()
        assert course.before is not None
        if not course.rounded < course.before:
            self._callbacks.warn(
                f"distillation: rounded to the export dtypes the held-out loss is {course.rounded:.6g}, and before it "
                f"{course.before:.6g}: the weights stay as they were"
            )
            course.kept_epoch, course.rounded = 0, course.before

    def _finished(self, index: int) -> Block:
        """A block with the weights that `finish` gives, to be run."""
        return self._work.of_state(index, self.finish(index).state)

    @property
    def _unjudged_peak(self) -> float:
        return _UNJUDGED * math.sqrt(min(self._settings.batch, len(self._train_set)))

    def _update(self, batch: Sequence[int]) -> float:
        """Train on a batch. Returns the mean loss before the update."""
        with reproducible(self._work.device):
            if self._course.peak is None:
                return self._first_update(batch)
            return self._student.update(batch, self._schedule.rate(self._course))

    def _first_update(self, batch: Sequence[int]) -> float:
        """Train on the first batch, and find the highest learning rate. Returns the mean loss before the update."""
        course, student = self._course, self._student
        loss = student.update(batch, _FIRST_TRIAL)
        if not math.isfinite(loss):
            return loss
        num_blocks = self._context.model.num_blocks
        if not all(bool(t.isfinite().all()) for index in range(num_blocks) for t in student.weights(index).values()):
            raise NumericalError(
                "distillation: the gradient of the first batch is NaN or infinite, so no learning rate will do: the "
                "model's weights or activations are too large. Leave the distillation out (--no-distill)"
            )
        student.keep_direction()

        def loss_at(rate: float) -> float:
            if len(course.trials) >= USUAL_TRIALS:
                self._passes.add_judgements(1)
            student.move(rate / _FIRST_TRIAL)
            held_out = _mean(student.losses(self._held_out))
            course.trials.append(Trial(rate, held_out if math.isfinite(held_out) else math.inf))
            return course.trials[-1].loss

        assert course.before is not None
        best = search(loss_at, course.before, _FIRST_TRIAL)
        self._passes.add_judgements(min(len(course.trials) - USUAL_TRIALS, 0))
        if best is None:
            best = self._unjudged_peak / _PEAK
            self._callbacks.warn(
                "no distance along the first update of distillation lowers the loss of the "
                f"{len(self._held_out)} held-out samples: the learning rate is as without them"
            )
        course.peak = float(f"{_PEAK * best:.3g}")  # as it is reported: --distill-lr can repeat it
        student.move(best / _FIRST_TRIAL)
        return loss

    def _judge(self) -> float | None:
        """The mean loss over the held-out samples; None: there are none."""
        if not self._held_out:
            return None
        mean = _mean(self._student.losses(self._held_out))
        if not math.isfinite(mean):
            raise NumericalError(
                f"distillation: the held-out loss is {mean} after {len(self._course.updates)} updates; {self._advice()}"
                if self._course.updates
                else _BROKEN.format(mean)
            )
        return mean

    def _advice(self) -> str:
        rate = Rate(self._course.peak or _FIRST_TRIAL, self._lr.is_relative)
        return f"use a smaller --distill-lr than {rate} (a new run can take over this one's blocks by --from-run)"

    def _end_epoch(self) -> None:
        """Keep the epoch's weights, or undo them if the held-out loss did not fall (Adam's moments stay)."""
        course = self._course
        is_last = course.epoch == course.beginning + self._settings.epochs
        held_out = self._judge()
        if held_out is None or held_out < course.best:
            course.best = math.inf if held_out is None else held_out
            course.kept_epoch = course.epoch
            if held_out is not None and not is_last:
                self._student.save_best()
        else:
            course.rate *= BACKTRACK
            self._student.restore_best()
        course.epochs.append(Losses(_mean(course.losses), held_out))
        course.losses = []
        course.epoch += 1
        course.is_over = is_last
        if is_last and not course.kept_epoch and len(course.epochs) < _MOST_FAILURES:
            course.beginning, course.is_over = len(course.epochs), False
            self._passes.add_epochs()
        self._checkpoint_due()

    def _checkpoint_due(self) -> None:
        """An update is finished."""
        self._student.checkpoint(self._checkpoint)

    def boundary(self) -> None:
        """Stop here if requested. Between passes, weights and moments are those of the last finished update."""
        if self._restored is None and self._course.updates:
            self._student.stop_or_checkpoint(self._checkpoint)
        else:
            self._callbacks.check_stop()

    def advance(self, loss: float | None = None, /) -> None:
        """Report that a pass is done. loss: of the sample."""
        if loss is not None:
            self._shown = {"loss": loss, "epoch": self._course.epoch}
        self._passes.advance()

    def _report(self, done: int, total: int) -> None:
        self._callbacks.report(done, total, "passes", **self._shown)

    def _checkpoint(self) -> Checkpoint:
        self._student.store()
        return Checkpoint(figures={"course": self._course.to_json()}, parts=tuple(self._student.parts))


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)


class _Quiet:
    """`stages.finish_block.Progress` of work that is too short to show."""

    def boundary(self) -> None:
        """Do nothing."""

    def advance(self, count: int = 1, /) -> None:
        """Do nothing."""
