"""Further evaluations of a run: other data, other tasks, after it was exported."""

from __future__ import annotations

from pipeline.config.completion import check_evaluation, usual_tasks
from pipeline.config.declarations import GivenSettings, flag_of
from pipeline.config.run_config import RunConfig
from pipeline.config.settings import Settings
from pipeline.engine.plan import next_steps
from pipeline.errors import ConfigError, StepOrderError
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.same_run import require_same_data, require_same_rows
from pipeline.steps.lamp_plan import chain_of
from pipeline.steps.run_facts import facts_of
from pipeline.steps.stage_settings import task_data_of


def require_exported(run: RunDirectory, config: RunConfig) -> None:
    """Raise StepOrderError, naming the step to do first, unless the run has a model to evaluate."""
    todo = next_steps(chain_of(config, facts_of(run).model.num_blocks), [commit.step for commit in run.commits])
    if todo:
        raise StepOrderError(f"evaluate comes later: do {todo[0].name} first")


def change_evaluation(run: RunDirectory, config: RunConfig, settings: GivenSettings) -> RunConfig:
    """The configuration with other evaluation settings; None among them: as they are.

    Raises ConfigError, UsageError.
    """
    from stages.data.registry import parse_source
    from stages.evaluate import metric_for
    from stages.metrics.zero_shot import check_tasks
    from stages.tasks.registry import task_named

    given = Settings.of({**settings, "model": config.model})  # its checks, and its conversion of lists
    changes = {field: getattr(given, field) for field, value in settings.items() if value is not None}
    if given.evaluate is not None:
        changes["evaluate"] = tuple(parse_source(name).name for name in given.evaluate)
    if given.tasks is None and not config.tasks:
        changes["tasks"] = usual_tasks(given.task_data, given.task_limit)
    changed = config.with_runtime(changes)
    check_evaluation(changed, facts_of(run).model.max_positions)
    model, task = facts_of(run).model.name, facts_of(run).model.task
    if not task_named(task).reads_text:
        language_only = ("eval_seqlen", "eval_max_tokens", "tasks", "task_data", "task_limit")
        for field in language_only:
            if changes.get(field):
                raise ConfigError(f"{flag_of(field)}: {model} is a {task} model; that is about text")
    for name in changed.evaluate:
        source = parse_source(name)
        if source.task != task:
            raise ConfigError(f"{name} is no data for {model}, a {task} model")
        for metric in changed.metrics:
            metric_for(task, metric)
        source.check()
        require_same_data(run, name, source.digest())
    if changed.tasks:
        check_tasks(changed.tasks, task_data_of(changed))
        require_same_rows(run, changed)
    return changed
