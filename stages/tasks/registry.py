"""The tasks by name. A task is one modality: what its models are calibrated on and measured by."""

from __future__ import annotations

from stages.registry import Registry
from stages.tasks.base import Task

TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "language": "stages.tasks.language:Language",
        "vision": "stages.tasks.segmentation:Vision",
    },
)


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        UsageError: There is none.
    """
    return TASKS.get(name)()
