"""Begin a run, find one again, go on with it: what the commands share.

settings --pipeline.runs.prepare--> configuration, model, budget, plan --start--> run directory --go_on--> model
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config.completion import check_evaluation, usual_tasks
from pipeline.config.run_config import Recorded, RunConfig, differing_fields, with_recorded_defaults
from pipeline.config.settings import flag_of, with_current_names
from pipeline.engine.disk_budget import most_needed, require_room
from pipeline.engine.job import Job, Listener
from pipeline.engine.plan import Step, next_steps, releasable
from pipeline.engine.repair import repair
from pipeline.engine.runner import advance
from pipeline.engine.stop import StopRequest
from pipeline.errors import ConfigError, ConfigMismatch, DamagedData, FileExists, RunNotFound, StepOrderError
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import RunManifest
from pipeline.rundir.run_directory import RunDirectory, find_runs
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.local import free_bytes
from pipeline.rundir.storage.locate import Place, locate, scratch_folder
from pipeline.runs.model_card import ModelView
from pipeline.runs.prepare import RUNS, Prepared, environment_record
from pipeline.steps.evaluate import evaluations_of
from pipeline.steps.lamp_plan import chain_of, steps_of
from pipeline.steps.run_facts import (
    EnvironmentRecord,
    config_in_force,
    config_of,
    environment_of,
    facts_of,
)
from pipeline.steps.stage_settings import task_data_of
from pipeline.steps.zero_shot import accuracies_of

log = logging.getLogger(__name__)

Checks = Literal["sizes", "as needed", "all"]


def start(prepared: Prepared, place: Place) -> tuple[RunDirectory, RunConfig]:
    """The run at `place`, a new one or the one that is there, and its configuration.

    A run that is there keeps its own value of every setting that was a default when it began and is one now.

    Raises:
        ConfigMismatch: Another run is there; the message names the settings that differ.
    """
    storage = locate(place)
    _place_scratch(storage, prepared.config)
    if RunDirectory.is_at(storage):
        return _same_run(RunDirectory.open(storage, is_resuming=True), prepared)
    manifest = RunManifest.new(
        created_at=datetime.now(UTC),
        config=prepared.config.as_json(),
        provenance=prepared.origins,
        identity={"settings": prepared.config.identity, "model": prepared.model["files"], "data": prepared.data},
        model=prepared.model,
        environment=prepared.environment,
        budget=[asdict(block) for block in prepared.budget],
        plan=[step.name for step in prepared.steps],
    )
    try:
        return RunDirectory.create(storage, manifest), prepared.config
    except FileExists:  # another process was first
        return _same_run(RunDirectory.open(storage), prepared)


def _same_run(run: RunDirectory, prepared: Prepared) -> tuple[RunDirectory, RunConfig]:
    """The run and its configuration with the runtime settings that are asked for now. Raises ConfigMismatch."""
    recorded = Recorded(config_of(run), with_current_names(run.manifest.provenance))
    prepared = replace(prepared, config=with_recorded_defaults(prepared.config, prepared.origins, recorded))
    require_same(run, prepared)
    return run, prepared.config


def _place_scratch(storage: Storage, config: RunConfig) -> None:
    if config.scratch_dir is not None:
        storage.use_scratch(scratch_folder(Path(config.scratch_dir), storage))


def require_same(run: RunDirectory, prepared: Prepared) -> None:
    """Raise ConfigMismatch if the run's identity differs from what is asked for now."""
    identity = facts_of(run).identity
    differing = differing_fields(identity.settings, prepared.config.identity)
    if {name: file.model_dump() for name, file in identity.model.items()} != prepared.model["files"]:
        differing["model files"] = ("as they were", "changed since")
    calibration = prepared.config.calibration
    if calibration and identity.data.get(calibration) != prepared.data.get(calibration):
        differing["calibration text"] = ("as it was", "changed since")
    for name in prepared.config.evaluate:
        _require_same_text(run, name, prepared.data[name])
    if prepared.config.tasks:
        _require_same_rows(run, prepared.config)
    if differing:
        lines = [f"  {field}: {old!r} there, {new!r} asked for" for field, (old, new) in differing.items()]
        raise ConfigMismatch(
            f"{run.label} holds another run:\n" + "\n".join(lines) + "\n"
            "use another --run-dir, or the same settings to go on with that run"
        )


def _require_same_text(run: RunDirectory, source: str, digest: Any) -> None:
    """Raise ConfigMismatch if the run has figures of this source that were measured on another text."""
    for _, measured in evaluations_of(run):
        if measured.source == source and measured.source_digest != digest:
            raise ConfigMismatch(
                f"{source} has changed since {run.label} was evaluated on it: give the new data another name, so "
                "that its figures stand beside the old ones"
            )


def _require_same_rows(run: RunDirectory, config: RunConfig) -> None:
    """Raise ConfigMismatch if the run has accuracies that were measured on other rows in the same folder."""
    data = task_data_of(config)
    for _, measured in accuracies_of(run):
        if data is None or measured.task_data != config.task_data or measured.task not in config.tasks:
            continue
        if measured.task_data_digest != data.digest(measured.task):
            raise ConfigMismatch(
                f"the rows of {measured.task} in {config.task_data} have changed since {run.label} was evaluated on "
                "them: put the new ones into another folder, so that their figures stand beside the old ones"
            )


def require_exported(run: RunDirectory, config: RunConfig) -> None:
    """Raise StepOrderError, naming the step to do first, unless the run has a model to evaluate."""
    todo = next_steps(chain_of(config, facts_of(run).model.num_blocks), [commit.step for commit in run.commits])
    if todo:
        raise StepOrderError(f"evaluate comes later: do {todo[0].name} first")


def reopen(
    place: Place, *, is_resuming: bool = False, free: Mapping[str, Any] | None = None
) -> tuple[RunDirectory, RunConfig]:
    """A run and its configuration, with the free settings that were last in force.

    is_resuming: as `RunDirectory.open` has it. free: other free settings from now on; None among them: as they were.
    Raises ConfigError for a wrong one.
    """
    run = RunDirectory.open(place, is_resuming=is_resuming)
    config = config_in_force(run)
    changes = {field: value for field, value in (free or {}).items() if value is not None}
    config = config.with_free(changes)
    _place_scratch(run.storage, config)
    return run, config


def change_evaluation(
    run: RunDirectory, config: RunConfig, sources: str | None, settings: Mapping[str, Any]
) -> RunConfig:
    """The configuration with other evaluation settings (None: as they are). Raises ConfigError, UsageError.

    sources: between commas. settings: other free settings by name, None among them: as they are.
    """
    from stages.metrics.zero_shot import check_tasks
    from stages.tasks.registry import parse_source

    changes = {field: value for field, value in settings.items() if value is not None}
    if sources is not None:
        changes["evaluate"] = [parse_source(name.strip()).name for name in sources.split(",") if name.strip()]
    if "tasks" not in changes and not config.tasks:
        changes["tasks"] = usual_tasks(changes.get("task_data"), changes.get("task_limit"))
    changed = config.with_free(changes)
    check_evaluation(changed, facts_of(run).model.max_positions)
    model, task = facts_of(run).model.name, facts_of(run).model.task
    if task == "vision":
        language_only = ("eval_seqlen", "eval_max_tokens", "tasks", "task_data", "task_limit")
        for field in language_only:
            if changes.get(field):
                raise ConfigError(f"{flag_of(field)}: {model} is a vision model; that is about text")
    for name in changed.evaluate:
        source = parse_source(name)
        if source.task != task:
            raise ConfigError(f"{name} is no data for {model}, a {task} model")
        source.check()
        _require_same_text(run, name, source.digest())
    if changed.tasks:
        check_tasks(changed.tasks, task_data_of(changed))
        _require_same_rows(run, changed)
    return changed


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    return not next_steps(steps_of(run, config), [commit.step for commit in run.commits])


def go_on(
    run: RunDirectory,
    config: RunConfig,
    listener: Listener,
    stop: StopRequest,
    *,
    until: Callable[[Step], bool] = lambda step: False,
    shared_with: RunDirectory | None = None,
    checks: Checks = "as needed",
    takeover: bool = False,
) -> None:
    """Do what is left of a run, up to and with a step for which `until` holds, and make damaged data again.

    checks: what is compared first: "sizes"; "as needed", which is every digest if there is something left to do; or
    "all", every digest in any case. takeover: even if somebody else seems to be at work.
    Raises Occupied if somebody else is; ConfigMismatch on another machine than the run's, unless that is allowed.
    """
    if is_finished(run, config) and checks != "all" and run.is_published("model"):
        return
    with Lease(run, stop.request, listener.warn, takeover=takeover):
        run.refresh()
        _settle_environment(run, config, listener)
        _go_on(run, config, listener, stop, until, shared_with, checks)


def _go_on(
    run: RunDirectory,
    config: RunConfig,
    listener: Listener,
    stop: StopRequest,
    until: Callable[[Step], bool],
    shared_with: RunDirectory | None,
    checks: Checks,
) -> None:
    from pipeline.steps.executor import StepExecutor
    from stages.machine import device

    steps = steps_of(run, config)
    worker = StepExecutor(run, config, steps, shared_with)
    device.apply(worker.choices)
    has_more = not is_finished(run, config)
    job = Job(
        run,
        steps,
        worker,
        listener,
        stop,
        config.free,
        refresh_views=ModelView(run, config).refresh,
        keeps_activations=bool(config.keep_activations),
        checkpoint_every_s=60 * config.checkpoint_minutes,
        allows_other_bits=config.allow_environment_change,
    )
    if has_more:
        _require_room(run, config, steps, worker)
        worker.fit_memory()
    repair(job, is_deep=checks == "all" or (checks == "as needed" and has_more))
    try:
        advance(job, until)
    except DamagedData as error:
        # Damaged since it was checked, or checked by size alone.
        listener.warn(str(error))
        repair(job)
        advance(job, until)
    if is_finished(run, config):
        run.storage.drop_copies()


def _settle_environment(run: RunDirectory, config: RunConfig, listener: Listener) -> None:
    """See that this machine is the one that the run goes on with, or write down that it is another one."""
    environment, changes = environment_here(run, config)
    if not changes:
        return
    lines = "\n".join(f"  {change}" for change in changes)
    if not config.allow_environment_change:
        raise ConfigMismatch(
            f"{run.label} was begun elsewhere, and its result could differ in the last bits here:\n{lines}\n"
            "go on where it was begun, or allow it: lampctl resume --allow-environment-change (or "
            "LAMPCTL_ALLOW_ENVIRONMENT_CHANGE=1)"
        )
    listener.warn(f"from here on, the run is done elsewhere:\n{lines}")
    run.change_environment(environment.model_dump(), changes, config.free)
    run.event("environment-changed", changes=changes)


def show_model(run: RunDirectory, config: RunConfig) -> None:
    """Make the exported model's folder, and its card, once more."""
    ModelView(run, config).refresh()


def _require_room(run: RunDirectory, config: RunConfig, steps: Sequence[Step], worker: Any) -> None:
    """Raise OutOfDisk, with the numbers, where the disk is too small for what is left to do."""
    need = most_needed(
        steps,
        [commit.step for commit in run.commits],
        worker.size_of,
        worker.scratch_of,
        keeps_activations=bool(config.keep_activations),
    )
    for disk in run.storage.disks:
        wanted = {}
        if disk.holds_weights:
            wanted["weights"] = need.weights
        if disk.holds_activations:
            wanted["activations"] = need.activations
        what = " and ".join(f"{kind} ({size / 1e9:.2f} GB)" for kind, size in wanted.items())
        require_room(disk.label, sum(wanted.values()), free_bytes(disk.folder), what)


def environment_here(run: RunDirectory, config: RunConfig) -> tuple[EnvironmentRecord, list[str]]:
    """This machine as the run would have it, and how it differs from the one in force, one sentence each.

    The arithmetic stays that of the run; threads and the like are chosen anew where the device is another one.
    """
    from stages.machine import device

    then = environment_of(run)
    choices = device.DeviceChoices(**then.device.model_dump())
    changes = []
    found = device.name_of(choices.device)
    if found != choices.device_name:
        what = found or "missing"
        changes.append(f"{choices.device} is {what} here, it was {choices.device_name}")
        chosen = device.choose(config.device, choices.dtype, config.threads)
        choices = replace(chosen, batch_tokens=choices.batch_tokens, compiles=choices.compiles)
    now = EnvironmentRecord.model_validate(environment_record(asdict(choices)))
    for name, version in _versions(then).items():
        here = _versions(now).get(name)
        if here != version:
            changes.append(f"{name} is {here} here, it was {version}")
    return now, changes


def _versions(environment: EnvironmentRecord) -> dict[str, str]:
    """The versions that may change the last bits: of Python, its minor version."""
    python = ".".join(environment.python.split(".")[:2])
    return {**environment.packages, "python": python}


def newest_unfinished(root: Path = RUNS) -> Path | None:
    """The run under `root` that was begun last and is not finished; None if all are. Raises RunNotFound."""
    found = find_runs(root)
    for path in found:
        try:
            run, config = reopen(path)
        except (DamagedData, ConfigMismatch) as error:
            log.warning("passing over %s: %s", path, error)
            continue
        if not is_finished(run, config):
            return path
    if not found:
        raise RunNotFound(
            f"there are no runs under {root}/: begin one with lampctl run, or name one that lies elsewhere"
        )
    return None


def collect_garbage(run: RunDirectory, config: RunConfig, *, is_dry_run: bool) -> dict[str, int]:
    """Delete what the run does not need, or only list it: {key: bytes}."""
    steps = steps_of(run, config)
    done = [commit.step for commit in run.commits]
    roots = [run.payload(name).root for name in releasable(steps, done)]
    found = {key: sum(run.storage.sizes(key).values()) for key in (*run.leftovers(), *roots) if run.storage.exists(key)}
    if not is_dry_run:
        run.release(releasable(steps, done))
        run.clean()
    return found
