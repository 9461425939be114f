"""Callbacks of one step: reports go to the listener, checkpoints to the run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.engine.job import Job
from pipeline.engine.plan import Step
from pipeline.rundir.step_checkpoints import ScratchParts, StepProgress
from stages.interfaces import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class StepCallbacks:
    """`stages.interfaces.DurableCallbacks` for one step of a job."""

    def __init__(
        self, job: Job, step: Step, progress: StepProgress | None = None, parts: ScratchParts | None = None
    ) -> None:
        """Bind the callbacks to a step.

        Args:
            job: The job that the step belongs to.
            step: The step.
            progress: Its checkpoints; None: the work saves none and always starts from the beginning.
            parts: Where parts of its state are kept if there are no checkpoints.
        """
        self._job, self._step, self._progress = job, step, progress
        self._parts = progress if progress is not None else parts
        self._saved_at = time.monotonic()
        self._first: str | None = None  # the figures that the step began with, as JSON

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._job.listener.step_progress(self._step, done, total, unit, figures)

    def restore(self) -> Checkpoint | None:
        found = self._progress.restore() if self._progress is not None else None
        if found is not None:
            self._first = _figures(found)
            self._job.listener.step_resumed(self._step)
        return found

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        every_s = self._job.checkpoint_every_s
        self._checkpoint(make, is_due=every_s > 0 and time.monotonic() - self._saved_at >= every_s)

    def checkpoint_now(self, make: Callable[[], Checkpoint]) -> None:
        self._checkpoint(make, is_due=True)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        assert self._parts is not None, f"{self._step.name} stores parts of its state, and there is no place for them"
        self._parts.keep(name, tensors)

    def kept(self, name: str) -> Mapping[str, Tensor]:
        assert self._parts is not None, f"{self._step.name} stores parts of its state, and there is no place for them"
        return self._parts.kept(name)

    def _checkpoint(self, make: Callable[[], Checkpoint], *, is_due: bool) -> None:
        stop = self._job.stop
        is_asked = stop.is_requested or stop.awaits_advance
        if self._progress is not None and (is_due or is_asked) and stop.keeps_progress:
            with stop.saving():
                made = make()
                is_further = self._is_further(made)
                if is_further or not stop.awaits_advance:
                    self._progress.save(made)
                    self._saved_at = time.monotonic()
            if is_further:
                stop.advanced()
        stop.check()

    def _is_further(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is further than what this step began with here: the first one may be that itself."""
        figures = _figures(checkpoint)
        if self._first is None:
            self._first = figures
        return figures != self._first

    def check_stop(self) -> None:
        self._job.stop.check()

    def warn(self, message: str) -> None:
        self._job.listener.warn(message)


def _figures(checkpoint: Checkpoint) -> str:
    """The figures of a checkpoint as text. They change with every batch that it holds."""
    return json.dumps(checkpoint.figures, sort_keys=True)
