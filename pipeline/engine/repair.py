"""Rebuild damaged payloads before a run is resumed, bit for bit, and put them back in their place.

An activation stream is rebuilt by running finished blocks forward (`Worker.replay`), every other payload by executing
its step again; lost inputs are rebuilt first. The result must have the committed digests. A step that now gives other
weights, which happens only on another machine or with other versions, is invalidated with all that was built on it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from pipeline.engine.callbacks import StepCallbacks
from pipeline.engine.job import Job
from pipeline.engine.plan import is_stream, maker_of, needed, sources_of
from pipeline.engine.verify import damaged_payloads
from pipeline.errors import DamagedData
from pipeline.rundir.records import Payload, Replacement
from pipeline.rundir.run_directory import StepReport
from pipeline.rundir.step_checkpoints import ScratchParts


def repair(job: Job, *, is_deep: bool = True) -> None:
    """Rebuild every damaged payload that is still needed, and report each one to the listener.

    Args:
        job: The run and its plan.
        is_deep: Compare digests; otherwise only presence and sizes.

    Raises:
        DamagedData: A stream comes out with other bits, and the job does not allow that.
        Preempted, Interrupted: A stop was requested.
    """
    run = job.run
    while True:
        damaged = damaged_payloads(run, run.made(needed(job.steps, job.committed)), is_deep=is_deep)
        if not damaged:
            return
        run.forget_checks()
        name, reason = next(iter(damaged.items()))
        job.listener.warn(f"{run.label}/{reason}: {name} is made again")
        if not _rebuild(job, name):
            commit = run.find(name)[0]
            run.invalidate(commit.number, f"{name} was damaged, and {commit.step} gives another one here", job.runtime)
            run.event("invalidated", from_number=commit.number, step=commit.step)
            job.listener.warn(
                f"{commit.step} gives other weights here than it did (another machine, or other versions): it and "
                "the steps after it are done again"
            )


def _rebuild(job: Job, name: str) -> bool:
    """Rebuild a payload, after the payloads that this needs. False if it consists of weights and they differ."""
    run = job.run
    for source in sources_of(name, job.steps):
        if damaged_payloads(run, [source], is_deep=True) and not _rebuild(job, source):
            return False
    step, is_activations = maker_of(name, job.steps), is_stream(name, job.steps)
    commit, payload = run.find(name)
    # Under a name of its own: it becomes a record only if it comes out differently.
    attempt = run.begin_again(f"rebuild/{name}")
    callbacks = StepCallbacks(job, step, parts=ScratchParts(attempt))
    is_committed = False
    started_at, start = datetime.now(UTC), time.monotonic()
    try:
        if is_activations:
            job.worker.replay(name, attempt, callbacks)
        else:
            job.worker.execute(step, attempt, callbacks)
        rebuilt = attempt.seal()[name]
        if _is_same(rebuilt, payload):
            _put_back(job, rebuilt, payload)
            run.event("mended", payload=name, step=commit.step)
            return True
        if is_activations and job.allows_other_bits:
            result = Replacement(replaces=commit.number)
            run.commit(attempt, StepReport(result, job.runtime, started_at, time.monotonic() - start))
            is_committed = True
            run.event("rebuilt", payload=name, step=commit.step)
            job.listener.warn(f"{name} has other bits here than it had: the run continues with them")
            return True
        if is_activations:
            raise DamagedData(_other_bits(job, name, commit.step))
        return False
    finally:
        if not is_committed:
            run.storage.remove(f"data/{attempt.id}")


def _put_back(job: Job, rebuilt: Payload, payload: Payload) -> None:
    job.run.check_superseded()
    job.run.storage.put_back(rebuilt.root, payload.root)
    job.run.forget_checks()


def _is_same(rebuilt: Payload, committed: Payload) -> bool:
    """Whether both payloads have the same files, wherever they are stored."""

    def contents(payload: Payload) -> set[tuple[str, int, str]]:
        return {(payload.inner(file), file.size, file.sha256) for file in payload.files}

    return contents(rebuilt) == contents(committed)


def _other_bits(job: Job, name: str, step: str) -> str:
    return (
        f"{name} of {step} in {job.run.label} was damaged, and running the finished blocks gives other bits here than "
        "it did. Resume on the kind of machine, and with the versions, that the run began with; or accept other bits "
        "with --allow-environment-change; or start over in a new run directory"
    )
