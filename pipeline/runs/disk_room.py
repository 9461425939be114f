"""Check before a run is done that its disks have room for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.disk_budget import most_needed, require_room
from pipeline.engine.job import Job
from pipeline.rundir.storage.local import free_bytes

if TYPE_CHECKING:
    from pipeline.steps.executor import StepExecutor


def require_room_for(job: Job, worker: StepExecutor) -> None:
    """Raise OutOfDisk, with the numbers, if a disk is too small for the remaining steps."""
    need = most_needed(
        job.steps,
        job.committed,
        worker.size_of,
        worker.scratch_of,
        keeps_activations=job.keeps_activations,
    )
    for disk in job.run.storage.disks:
        wanted = {}
        if disk.holds_weights:
            wanted["weights"] = need.weights
        if disk.holds_activations:
            wanted["activations"] = need.activations
        what = " and ".join(f"{kind} ({size / 1e9:.2f} GB)" for kind, size in wanted.items())
        require_room(disk.label, sum(wanted.values()), free_bytes(disk.folder), what)
