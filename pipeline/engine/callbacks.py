"""Callbacks of one step: reports go to the listener, checkpoints to the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.engine.job import Job
from pipeline.engine.plan import Step
from pipeline.rundir.step_checkpoints import StepProgress
from stages.interfaces import Checkpoint


class StepCallbacks:
    """`stages.interfaces.Callbacks` for one step of a job."""

    def __init__(self, job: Job, step: Step, progress: StepProgress | None = None) -> None:
        """Bind the callbacks to a step.

        Args:
            job: The job that the step belongs to.
            step: The step.
            progress: Its checkpoints; None: the work saves none and always starts from the beginning.
        """
        self._job, self._step, self._progress = job, step, progress
        self._saved_at = time.monotonic()

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._job.listener.step_progress(self._step, done, total, unit, figures)

    def restore(self) -> Checkpoint | None:
        return self._progress.restore() if self._progress is not None else None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        stop, every_s = self._job.stop, self._job.checkpoint_every_s
        is_due = every_s > 0 and time.monotonic() - self._saved_at >= every_s
        if self._progress is not None and (is_due or stop.is_requested) and stop.keeps_progress:
            with stop.saving():
                self._progress.save(make())
            self._saved_at = time.monotonic()
        stop.check()

    def check_stop(self) -> None:
        self._job.stop.check()

    def warn(self, message: str) -> None:
        self._job.listener.warn(message)
