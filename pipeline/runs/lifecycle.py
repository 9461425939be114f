"""Begin a run, open it again, resume it: what the commands share.

settings --prepare--> configuration, model, budget, plan --start--> run directory --resume--> exported model
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.config.declarations import GivenSettings, with_current_names
from pipeline.config.run_config import Recorded, RunConfig, with_recorded_defaults
from pipeline.engine.job import Job, Listener
from pipeline.engine.plan import Step, next_steps
from pipeline.engine.repair import repair
from pipeline.engine.runner import advance
from pipeline.engine.stop import StopRequest
from pipeline.errors import ConfigMismatch, DamagedData, FileExists, RunNotFound
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import RunManifest
from pipeline.rundir.run_directory import RunDirectory, find_runs
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.locate import Place, locate, scratch_folder
from pipeline.runs.disk_room import require_room_for
from pipeline.runs.environment import settle_environment
from pipeline.runs.model_card import ModelView
from pipeline.runs.origin import origin_of
from pipeline.runs.prepare import RUNS, Prepared
from pipeline.runs.same_run import require_same
from pipeline.steps.lamp_plan import steps_of
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.run_facts import StoredBlockBudget, config_in_force, config_of

log = logging.getLogger(__name__)

Checks = Literal["sizes", "as needed", "all"]


@dataclass(frozen=True)
class ResumeOptions:
    """How a run is resumed.

    Attributes:
        until: Stop after the first step for which this holds.
        shared_with: A run whose results are used where its step kinds allow that.
        checks: What is compared with the commits first: "sizes"; "as needed": every digest if a step is left to do;
            "all": every digest in any case.
        takeover: Resume although another process seems to work on the run.
    """

    until: Callable[[Step], bool] = lambda step: False
    shared_with: RunDirectory | None = None
    checks: Checks = "as needed"
    takeover: bool = False


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
        identity=prepared.identity.model_dump(mode="json"),
        model=prepared.model.model_dump(mode="json"),
        environment=prepared.environment.model_dump(mode="json"),
        budget=[StoredBlockBudget.of(block).model_dump(mode="json") for block in prepared.budget],
        plan=[step.name for step in prepared.steps],
    )
    try:
        return RunDirectory.create(storage, manifest), prepared.config
    except FileExists:  # another process was first
        return _same_run(RunDirectory.open(storage), prepared)


def _same_run(run: RunDirectory, prepared: Prepared) -> tuple[RunDirectory, RunConfig]:
    """The run and its configuration with the runtime settings that are asked for now. Raises ConfigMismatch."""
    recorded = Recorded(config_of(run), with_current_names(run.manifest.provenance))
    config = with_recorded_defaults(prepared.config, prepared.origins, recorded)
    if all(origins.get("end_loss", "default") == "default" for origins in (prepared.origins, recorded.origins)):
        config = config.changed(end_loss=config_in_force(run).end_loss)  # a run of an older version gains no step
    prepared = replace(prepared, config=config)
    require_same(run, prepared)
    return run, prepared.config


def _place_scratch(storage: Storage, config: RunConfig) -> None:
    if config.scratch_dir is not None:
        storage.use_scratch(scratch_folder(Path(config.scratch_dir), storage))


def reopen(
    place: Place, *, is_resuming: bool = False, runtime: GivenSettings | None = None
) -> tuple[RunDirectory, RunConfig]:
    """Open a run with its configuration, with the runtime settings that were last in force.

    Args:
        place: Folder or address of the run.
        is_resuming: As for `RunDirectory.open`.
        runtime: Other runtime settings from now on; None among them: as they were.

    Raises:
        ConfigError: A runtime setting is wrong.
        DamagedData: run.json or a commit does not hold what lampctl writes.
    """
    run = RunDirectory.open(place, is_resuming=is_resuming)
    config = config_in_force(run)
    changes = {field: value for field, value in (runtime or {}).items() if value is not None}
    config = config.with_runtime(changes)
    _place_scratch(run.storage, config)
    return run, config


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    return not next_steps(steps_of(run, config), [commit.step for commit in run.commits])


def resume(
    run: RunDirectory,
    config: RunConfig,
    listener: Listener,
    stop: StopRequest,
    options: ResumeOptions | None = None,
) -> None:
    """Do the remaining steps of a run, and rebuild damaged data.

    Args:
        run: The run.
        config: Its configuration.
        listener: Receives progress and warnings.
        stop: Request to stop.
        options: How to resume; None: the defaults.

    Raises:
        Occupied: Another process works on the run.
        ConfigMismatch: This is another machine than the run's, and the run does not allow that.

    Runtime settings that no step records are recorded by themselves, so that the next command knows them.
    """
    options = options or ResumeOptions()
    has_work = not is_finished(run, config) or options.checks == "all" or not run.is_published("model")
    if not has_work and not _has_other_settings(run, config):
        return
    with Lease(run, stop.request, listener.warn, takeover=options.takeover):
        run.refresh()
        if has_work:
            settle_environment(run, config, listener)
            _do_remaining(run, config, listener, stop, options)
        if _has_other_settings(run, config):  # no step was left to record them
            run.change_settings(config.runtime)


def _has_other_settings(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the runtime settings differ from those that the run last recorded."""
    return config.runtime != config_in_force(run).runtime


def _do_remaining(
    run: RunDirectory, config: RunConfig, listener: Listener, stop: StopRequest, options: ResumeOptions
) -> None:
    from pipeline.steps.executor import StepExecutor
    from stages.machine import device

    steps = steps_of(run, config)
    done = [commit.step for commit in run.commits]
    takes_over = any(STEP_KINDS.get(step.kind).sharing == "same steps" for step in next_steps(steps, done))
    shared_with = (origin_of(config) if takes_over else None) or options.shared_with
    worker = StepExecutor(run, config, steps, shared_with)
    device.apply(worker.choices)
    has_more = not is_finished(run, config)
    job = Job(
        run,
        steps,
        worker,
        listener,
        stop,
        config.runtime,
        refresh_views=ModelView(run, config).refresh,
        keeps_activations=bool(config.keep_activations),
        checkpoint_every_s=60 * config.checkpoint_minutes,
        allows_other_bits=config.allow_environment_change,
    )
    if has_more:
        require_room_for(job, worker)
        shortage = worker.fit_memory()
        if shortage is not None:
            listener.warn(shortage)
    repair(job, is_deep=options.checks == "all" or (options.checks == "as needed" and has_more))
    try:
        advance(job, options.until)
    except DamagedData as error:
        # Damaged since it was checked, or checked by size alone.
        listener.warn(str(error))
        repair(job)
        advance(job, options.until)
    if is_finished(run, config):
        run.storage.drop_copies()


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
        raise RunNotFound(f"there are no runs under {root}/: begin one with lampctl run, or name one in another folder")
    return None
