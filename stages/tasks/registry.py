"""The tasks by name. A task is one modality: what its models are calibrated on and measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry
from stages.tasks.base import Task

if TYPE_CHECKING:
    from stages.data.base import DataSource
    from stages.models.base import BlockModel

TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "language": "stages.tasks.language:Language",
        "vision": "stages.tasks.segmentation:Vision",
        "vision-features": "stages.tasks.vision_features:VisionFeatures",
    },
)

# The task of records that name none: they are older than the second task.
UNNAMED_TASK = TASKS.builtin_names[0]


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        UsageError: There is none.
    """
    return TASKS.get(name)()


def model_for(task: str) -> str:
    """A model of a task in words: "a model for segmentation". task: a name of `TASKS`."""
    return f"a model for {task_named(task).title}"


def require_readable(source: DataSource, model: BlockModel) -> None:
    """Raise UsageError where a data source holds what models of this task do not read."""
    from stages.data.registry import source_forms
    from stages.errors import UsageError

    contents = task_named(model.task).contents
    if source.contents != contents:
        raise UsageError(
            f"{source.name} holds {source.contents}, and {model.source.name}, {model_for(model.task)}, reads "
            f"{contents}: name one of {', '.join(source_forms(contents))}"
        )
