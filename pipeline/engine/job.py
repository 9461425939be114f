"""What the engine runs: a run directory, its plan, a worker that does the steps, and a listener that reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.engine.plan import Step
from pipeline.engine.stop import StopRequest
from pipeline.rundir.records import Result, StepCommit
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import Attempt
from stages.interfaces import Callbacks, DurableCallbacks

if TYPE_CHECKING:
    from pydantic import JsonValue


class Listener(Protocol):
    """Receives the progress of a run."""

    def step_started(self, step: Step, position: int, total: int) -> None:
        """Step number `position` of `total`, from 0, begins."""
        ...

    def step_resumed(self, step: Step) -> None:
        """The step was begun earlier, and resumes from a checkpoint."""
        ...

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        """The running step has done `done` of `total` units. figures: values worth showing, such as the loss."""
        ...

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        """The step is committed."""
        ...

    def warn(self, message: str) -> None:
        """Show a message that the user should read."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step reports beside its payloads.

    Attributes:
        result: The result for the commit.
        peak_memory_bytes: Peak memory of the process.
        peak_device_bytes: Peak memory of the GPU; None: no GPU was used.
        elapsed_s: Seconds of the work, where it was done in another run; None: as measured here.
    """

    result: Result
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    elapsed_s: float | None = None


class Worker(Protocol):
    """Does the work of steps."""

    def execute(self, step: Step, attempt: Attempt, callbacks: DurableCallbacks) -> StepResult:
        """Read the step's inputs from the run and write its payloads into the attempt."""
        ...

    def replay(self, name: str, attempt: Attempt, callbacks: Callbacks) -> None:
        """Write the activation stream `name` into the attempt again, bit for bit, from committed weights."""
        ...


@dataclass(frozen=True)
class Job:
    """One run and everything that is needed to bring it forward.

    Attributes:
        run: The run directory.
        steps: The whole plan, in order.
        worker: Does the steps.
        listener: Receives progress and warnings.
        stop: Request to stop.
        runtime: The runtime settings in force, recorded in each commit.
        refresh_views: Brings what is derived from the commits (the model folder, its card) up to date.
        keeps_activations: Release no activation stream.
        checkpoint_every_s: Seconds between checkpoints inside a step; 0: only when the run is stopped.
        allows_other_bits: A stream that comes out differently on another machine is committed as it is here.
    """

    run: RunDirectory
    steps: Sequence[Step]
    worker: Worker
    listener: Listener
    stop: StopRequest
    runtime: Mapping[str, JsonValue]
    refresh_views: Callable[[], None] = lambda: None
    keeps_activations: bool = False
    checkpoint_every_s: float = 0.0
    allows_other_bits: bool = False

    @property
    def committed(self) -> list[str]:
        """Names of the committed steps, in order."""
        return [commit.step for commit in self.run.commits]
