"""Walk the plan: run a step, commit it, release the payloads that no later step reads; stop when requested."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from pipeline.engine.callbacks import StepCallbacks
from pipeline.engine.job import Job
from pipeline.engine.plan import Step, is_stream, next_steps, releasable
from pipeline.rundir.records import StepCommit
from pipeline.rundir.run_directory import StepReport
from pipeline.rundir.step_checkpoints import StepProgress


def advance(job: Job, until: Callable[[Step], bool] = lambda step: False) -> None:
    """Do every step that has no commit yet, in order.

    Args:
        job: The run and its plan.
        until: Return after the first step for which this holds.

    Raises:
        Preempted, Interrupted, Superseded: A stop was requested. The run can be resumed.
        Exception: Whatever a step raises. The run can be resumed.
    """
    _settle(job)
    for step in next_steps(job.steps, job.committed):
        job.stop.check()
        position = next(i for i, other in enumerate(job.steps) if other.name == step.name)
        job.listener.step_started(step, position, len(job.steps))
        job.run.event("step-started", step=step.name)
        commit = _do(job, step)
        job.stop.advanced()
        job.run.event("step-committed", step=step.name, number=commit.number, elapsed_s=commit.elapsed_s)
        _settle(job)
        job.listener.step_finished(step, commit, position, len(job.steps))
        if until(step):
            return


def _do(job: Job, step: Step) -> StepCommit:
    """Execute one step in a fresh attempt and commit it."""
    progress = StepProgress(job.run, step.name)
    started_at = datetime.now(UTC)
    attempt = job.run.begin(step.name)
    try:
        result = job.worker.execute(step, attempt, StepCallbacks(job, step, progress))
        report = StepReport(
            result.result,
            job.runtime,
            started_at,
            progress.elapsed_s if result.elapsed_s is None else result.elapsed_s,
            result.peak_memory_bytes,
            result.peak_device_bytes,
        )
        return job.run.commit(attempt, report)
    except BaseException:
        job.run.abandon(attempt)
        raise


def _settle(job: Job) -> None:
    """Do what follows from the commits: release payloads, delete leftovers, refresh views."""
    released = job.run.made(releasable(job.steps, job.committed))
    job.run.release(name for name in released if not (job.keeps_activations and is_stream(name, job.steps)))
    job.run.clean()
    job.refresh_views()
