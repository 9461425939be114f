"""Check the data sources of a run before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.steps.stage_settings import distillation_drawing_of, drawing_of, task_data_of
from stages.errors import UsageError

if TYPE_CHECKING:
    from stages.data.base import SourceDigest
    from stages.models.base import BlockModel
    from stages.tasks.base import Task


def check_sources(config: RunConfig, model: BlockModel, task: Task) -> dict[str, SourceDigest | None]:
    """Digest of each local data source by name, after a check that each can be read and is large enough.

    Raises:
        UsageError: A source cannot be read, is too small, or is for another kind of model.
    """
    from stages.data.registry import parse_source
    from stages.evaluate import require_measurable
    from stages.tasks.registry import require_readable

    digests: dict[str, SourceDigest | None] = {}
    if config.calibration is not None:
        source = parse_source(config.calibration)
        require_readable(source, model)
        source.check()
        task.require_samples(model, source, drawing_of(config))
        if config.distill_samples is not None:
            try:
                task.require_samples(model, source, distillation_drawing_of(config))
            except UsageError as error:
                raise UsageError(f"--distill-samples {config.distill_samples}: {error}") from error
        digests[config.calibration] = source.digest()
    for name in config.evaluate:
        source = parse_source(name)
        for metric in (None, *config.metrics):
            require_measurable(model, source, config.evaluation_protocol, metric)
        digests[name] = source.digest()
    return digests


def check_zero_shot(config: RunConfig, model: BlockModel) -> None:
    """Raise ConfigError or UsageError where the zero-shot tasks do not exist or do not fit the model."""
    from stages.metrics.zero_shot import check_tasks
    from stages.tasks.registry import model_for, task_named

    if config.tasks and not task_named(model.task).reads_text:
        raise ConfigError(f"--tasks: {model.source.name} is {model_for(model.task)}, and zero-shot tasks are text")
    check_tasks(config.tasks, task_data_of(config))
