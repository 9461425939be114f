"""Further evaluations of a run: other data, other tasks, after it was exported."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pipeline.config.completion import check_evaluation, usual_tasks
from pipeline.config.declarations import GivenSettings, flag_of
from pipeline.config.run_config import RunConfig
from pipeline.config.settings import Settings
from pipeline.engine.plan import next_steps
from pipeline.errors import ConfigError
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.same_run import require_same_data, require_same_rows
from pipeline.steps.evaluate import naming_remedy
from pipeline.steps.lamp_plan import chain_of
from pipeline.steps.order import out_of_order
from pipeline.steps.run_facts import ModelRecord, facts_of
from pipeline.steps.stage_settings import task_data_of


def require_exported(run: RunDirectory, config: RunConfig) -> None:
    """Raise StepOrderError, naming the command to call first, unless the run has a model to evaluate."""
    todo = next_steps(chain_of(config, facts_of(run).model.num_blocks), [commit.step for commit in run.commits])
    if todo:
        raise out_of_order(f"lampctl evaluate {run.label}", todo[0], run)


def change_evaluation(run: RunDirectory, config: RunConfig, settings: GivenSettings) -> RunConfig:
    """The configuration with other evaluation settings; None among them: as they are.

    Raises ConfigError, UsageError.
    """
    from stages.data.registry import parse_source
    from stages.metrics.zero_shot import check_tasks

    given = Settings.of({**settings, "model": config.model})  # its checks, and its conversion of lists
    changes = {field: getattr(given, field) for field, value in settings.items() if value is not None}
    if given.evaluate is not None:
        changes["evaluate"] = tuple(parse_source(name).name for name in given.evaluate)
    if given.tasks is None and not config.tasks:
        changes["tasks"] = usual_tasks(given.task_data, given.task_limit)
    changed = config.with_runtime(changes)
    if changes.get("end_loss") and not changed.has_calibration_set:
        raise ConfigError(f"--end-loss: {run.label} has no calibration set to measure on")
    model = facts_of(run).model
    check_evaluation(changed, model.max_positions)
    _require_about(model, changes)
    _require_measurable(run, changed, changes)
    if changed.tasks:
        check_tasks(changed.tasks, task_data_of(changed))
        require_same_rows(run, changed)
    return changed


def _require_about(model: ModelRecord, changes: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings about text where the model reads none."""
    from stages.tasks.registry import model_for, task_named

    if task_named(model.task).reads_text:
        return
    for field in ("eval_seqlen", "eval_max_tokens", "tasks", "task_data", "task_limit"):
        if changes.get(field):
            raise ConfigError(f"{flag_of(field)}: {model.name} is {model_for(model.task)}; that is about text")


def _require_measurable(run: RunDirectory, config: RunConfig, changes: Mapping[str, Any]) -> None:
    """Raise ConfigError or UsageError unless all metrics can be measured on all data. changes: given now."""
    from stages.data.registry import parse_source, source_forms
    from stages.evaluate import metric_for
    from stages.tasks.registry import model_for, task_named

    model = facts_of(run).model
    for field, look_up in (
        ("evaluate", lambda: [parse_source(name) for name in config.evaluate]),
        ("metrics", lambda: [metric_for(model.task, name) for name in config.metrics]),
    ):
        with contextlib.nullcontext() if field in changes else naming_remedy(field, run.label):
            look_up()
    for name in config.evaluate:
        source = parse_source(name)
        contents = task_named(model.task).contents
        if source.contents != contents:
            raise ConfigError(
                f"{name} is no data for {model.name}, {model_for(model.task)}: name one of "
                f"{', '.join(source_forms(contents))}"
            )
        source.check()
        require_same_data(run, name, source.digest())
