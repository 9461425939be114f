"""Walk the plan: run a step, commit it, release what nobody will read again, go on; stop when asked to.

The engine knows no maths: a `Worker` does a step's work, and a `Listener` hears about it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Any, Protocol

from pipeline.engine.plan import Step, is_stream, next_steps, releasable
from pipeline.errors import Interrupted, PipelineError, Preempted, StepOrderError, Superseded
from pipeline.rundir.records import StepCommit
from pipeline.rundir.run_directory import Attempt, RunDirectory
from pipeline.rundir.step_checkpoints import StepProgress
from stages.interfaces import Callbacks, Checkpoint

# After a signal: how long the next batch boundary is waited for before the process ends where it is, and how long
# in all if a progress record is being written. Batch systems kill after 10 to 30 seconds.
_GRACE_S, _GRACE_SAVING_S = 4.0, 25.0


class Listener(Protocol):
    """Hears how a run goes on."""

    def step_started(self, step: Step, position: int, total: int) -> None:
        """Step number `position` of `total` (from 0) begins."""
        ...

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        """The running step is at `done` of `total` units."""
        ...

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        """The step is on disk for good."""
        ...

    def warn(self, message: str) -> None:
        """Something the user should read."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step leaves beside its payloads."""

    figures: Mapping[str, Any]
    peak_memory_bytes: int | None = None  # of the process
    peak_device_bytes: int | None = None  # of a GPU


class Worker(Protocol):
    """Does the work of steps."""

    def execute(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> StepResult:
        """Read the step's inputs from the run, write its payloads into the attempt."""
        ...

    def replay(self, name: str, attempt: Attempt, callbacks: Callbacks) -> None:
        """Write the activation stream `name` into the attempt once more, bit for bit, from committed weights."""
        ...

    def refresh_views(self) -> None:
        """Bring what lies outside the commits (the model folder, its card) up to date. May run any time."""
        ...


@dataclass
class StopRequest:
    """Set from a signal handler, read at batch boundaries. A second signal stops at once.

    end_process: called where no boundary comes within seconds; ends the process with the code of the error, which
    loses the step's work since its last progress record and nothing else: what is committed is safe at any instant.
    """

    end_process: Callable[[PipelineError], None]
    grace_s: float = _GRACE_S
    reason: PipelineError | None = None
    _previous: dict[int, Any] = field(default_factory=dict)
    _is_saving: bool = False
    _has_signal: bool = False
    _has_ended: bool = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._has_signal:
            raise self._error(number)
        self._has_signal = True
        self.request(self._error(number))

    def request(self, reason: PipelineError) -> None:
        """Ask for a stop at the next batch boundary, by that error. From any thread; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            threading.Thread(target=self._end_in_time, name="grace", daemon=True).start()

    @property
    def is_requested(self) -> bool:
        """Whether the work is to stop at the next batch boundary."""
        return self.reason is not None

    @property
    def keeps_progress(self) -> bool:
        """Whether a stop leaves work that somebody will go on with; who is superseded leaves none."""
        return not isinstance(self.reason, Superseded)

    def check(self) -> None:
        """Raise the reason to stop, if there is one."""
        if self.reason is not None:
            raise self.reason

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While a progress record is written, the process is given longer."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def _end_in_time(self) -> None:
        start = time.monotonic()
        time.sleep(self.grace_s)
        while self._is_saving and time.monotonic() - start < _GRACE_SAVING_S:
            time.sleep(0.05)
        if self._has_ended:
            return  # stopped already, and on its way out
        assert self.reason is not None
        self.end_process(self.reason)

    @staticmethod
    def _error(number: int) -> Preempted | Interrupted:
        kind = Interrupted if number == signal.SIGINT else Preempted
        return kind(
            f"stopped by {signal.Signals(number).name}; what is committed is safe; `lampctl resume`, or the "
            "same command again, goes on"
        )


class _StepCallbacks:
    """`stages.interfaces.Callbacks` for one step.

    progress: None for work that is not a step of its own, and is done from its beginning whenever it is done.
    """

    def __init__(
        self,
        step: Step,
        listener: Listener,
        stop: StopRequest,
        progress: StepProgress | None = None,
        checkpoint_every_s: float = 0.0,
    ) -> None:
        self._step, self._listener, self._stop = step, listener, stop
        self._progress, self._every_s = progress, checkpoint_every_s
        self._saved_at = time.monotonic()

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._listener.step_progress(self._step, done, total, unit, figures)

    def restore(self) -> Checkpoint | None:
        return self._progress.restore() if self._progress is not None else None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        is_due = self._every_s > 0 and time.monotonic() - self._saved_at >= self._every_s
        if self._progress is not None and (is_due or self._stop.is_requested) and self._stop.keeps_progress:
            with self._stop.saving():
                self._progress.save(make())
            self._saved_at = time.monotonic()
        self._stop.check()

    def check_stop(self) -> None:
        self._stop.check()

    def warn(self, message: str) -> None:
        self._listener.warn(message)


def callbacks_for(step: Step, listener: Listener, stop: StopRequest) -> Callbacks:
    """How work that is not the next step speaks with the listener and hears of a stop."""
    return _StepCallbacks(step, listener, stop)


def advance(
    run: RunDirectory,
    steps: Sequence[Step],
    worker: Worker,
    free: Mapping[str, Any],
    listener: Listener,
    stop: StopRequest,
    until: Callable[[Step], bool] = lambda step: False,
    keeps_activations: bool = False,
    checkpoint_every_s: float = 0.0,
) -> None:
    """Do every step that has no commit yet, in order; stop after one for which `until` holds.

    free: the free settings in force, recorded in each commit. keeps_activations: release none, for study.
    checkpoint_every_s: how often a step keeps how far it is, beside when it is stopped; 0: only then.
    Raises Preempted, Interrupted or Superseded when asked to stop, and whatever a step raises; the run stays resumable.
    """
    _settle(run, steps, worker, keeps_activations)
    for step in next_steps(steps, [commit.step for commit in run.commits]):
        stop.check()
        position = next(i for i, other in enumerate(steps) if other.name == step.name)
        listener.step_started(step, position, len(steps))
        run.event("step-started", step=step.name)
        progress = StepProgress(run, step.name)
        callbacks = _StepCallbacks(step, listener, stop, progress, checkpoint_every_s)
        started_at = datetime.now(UTC)
        attempt = run.begin(step.name)
        try:
            result = worker.execute(step, attempt, callbacks)
            commit = run.commit(
                attempt,
                figures=result.figures,
                free=free,
                started_at=started_at,
                elapsed_s=progress.elapsed_s,
                peak_memory_bytes=result.peak_memory_bytes,
                peak_device_bytes=result.peak_device_bytes,
            )
        except BaseException:
            run.abandon(attempt)
            raise
        run.event("step-committed", step=step.name, number=commit.number, elapsed_s=commit.elapsed_s)
        _settle(run, steps, worker, keeps_activations)
        listener.step_finished(step, commit, position, len(steps))
        if until(step):
            return


def require_next(run: RunDirectory, steps: Sequence[Step], wanted: Step) -> None:
    """Raise StepOrderError unless `wanted` is what has to be done now, naming the step to do first."""
    todo = next_steps(steps, [commit.step for commit in run.commits])
    if not any(step.name == wanted.name for step in steps):
        raise StepOrderError(f"this run has no step {wanted.name}; its steps: {_brief(steps)}")
    if not any(step.name == wanted.name for step in todo):
        raise StepOrderError(f"{wanted.name} is already done; next is {todo[0].name if todo else 'nothing'}")
    if todo[0].name != wanted.name:
        raise StepOrderError(f"{wanted.name} comes later: do {todo[0].name} first")


def _brief(steps: Sequence[Step]) -> str:
    names = [step.name for step in steps]
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _settle(run: RunDirectory, steps: Sequence[Step], worker: Worker, keeps_activations: bool) -> None:
    """What follows from the commits: payloads to release, attempts to delete, views to refresh."""
    released = releasable(steps, [commit.step for commit in run.commits])
    run.release(name for name in released if not (keeps_activations and is_stream(name)))
    run.clean()
    worker.refresh_views()
