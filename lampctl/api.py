"""Runs from Python: begin one, open one, resume it, read its results. `docs/api.md` has examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.declarations import GivenSettings
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.job import Listener
    from pipeline.engine.plan import Step
    from pipeline.rundir.records import StepCommit
    from pipeline.rundir.run_directory import RunDirectory
    from pipeline.runs.status import EvaluationResult, RunStatus
    from stages.sparsity.budget import BlockBudget

log = logging.getLogger(__name__)


class Run:
    """A run directory: its configuration, its results, and how to resume it. Make one with `run` or `open_run`."""

    def __init__(self, directory: RunDirectory, config: RunConfig) -> None:
        self._directory, self._config = directory, config

    def __repr__(self) -> str:
        state = self.status
        return f"Run({self.path!r}, {state.num_done} of {len(state.steps)} steps done)"

    @property
    def path(self) -> str:
        """The run directory: a folder, or an address in a bucket."""
        return self._directory.label

    @property
    def config(self) -> RunConfig:
        """Every setting, with the defaults filled in."""
        return self._config

    @property
    def status(self) -> RunStatus:
        """What is done: steps, blocks, losses, sparsity, time and memory. Read from the commits at each call."""
        from pipeline.runs.status import status

        self._directory.refresh()
        return status(self._directory, self._config)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status.is_finished

    @property
    def metrics(self) -> tuple[EvaluationResult, ...]:
        """Everything that was measured: metric, value, data source, of the pruned and of the original model."""
        return self.status.evaluations

    @property
    def budget(self) -> tuple[BlockBudget, ...]:
        """How many weights of each layer of each block are pruned."""
        from pipeline.steps.committed import stored_budget
        from pipeline.steps.stage_settings import block_budget

        return tuple(block_budget(block) for block in stored_budget(self._directory))

    @property
    def model_path(self) -> Path:
        """The exported model, a folder that transformers opens.

        Raises:
            ConfigError: The run has not exported it yet; or it is in a bucket.
        """
        from pipeline.rundir.storage.locate import is_address

        found = self.status.model
        if found is None:
            raise ConfigError(f"{self.path} has no model yet: call resume() first")
        if is_address(found):
            raise ConfigError(f"the model is in a bucket, at {found}: copy it to this machine first")
        return Path(found)

    def resume(self, *, listener: Listener | None = None, takeover: bool = False, **settings: Any) -> Run:
        """Do the remaining steps. Ctrl-C stops it; what is committed is kept.

        Args:
            listener: Receives progress; None: the log does, at level INFO.
            takeover: Take over a run that another process works on.
            **settings: Runtime settings from now on, such as ``evaluate`` or ``max_runtime``.

        Raises:
            ConfigError: A setting is wrong, or decides the weights.
            PipelineError, StageError: As `lampctl resume` reports them.
        """
        from lampctl.cli.stop_sources import watching
        from pipeline.engine.stop import StopRequest
        from pipeline.runs.lifecycle import ResumeOptions, resume

        self._config = self._config.with_runtime(_runtime_only(settings))
        stop = StopRequest(lambda reason: None)  # an interpreter is never ended
        with watching(self._config, stop):
            resume(self._directory, self._config, listener or _Log(), stop, ResumeOptions(takeover=takeover))
        return self


def run(
    model: str | Path,
    *,
    run_dir: str | Path | None = None,
    preset: str | None = None,
    config_file: str | Path | None = None,
    listener: Listener | None = None,
    takeover: bool = False,
    **settings: Any,
) -> Run:
    """Prune a model as a resumable run, as `lampctl run` does. The same call again resumes it.

    Args:
        model: Alias, name on the Hugging Face hub, folder, GGUF file or Segment Anything checkpoint.
        run_dir: A folder, or s3://, gs:// or az://BUCKET/PREFIX; None: ``runs/<model>-s<percent>-<method>``.
        preset: "quick" or "paper".
        config_file: YAML or TOML with settings.
        listener: Receives progress; None: the log does, at level INFO.
        takeover: Take over a run that another process works on.
        **settings: Any setting of `lampctl run` by its name: ``sparsity=0.7``, ``method="wanda"`` (docs/settings.md).

    Raises:
        ConfigError: A setting is wrong.
        PipelineError, StageError: As `lampctl run` reports them.
    """
    from pipeline.config.gather import gather
    from pipeline.runs.lifecycle import start
    from pipeline.runs.prepare import prepare

    file = Path(config_file) if config_file is not None else None
    prepared = prepare(gather({**settings, "model": str(model)}, file, preset))
    for notice in prepared.notices:
        log.warning("%s", notice)
    directory, config = start(prepared, run_dir if run_dir is not None else prepared.default_run_dir)
    return Run(directory, config).resume(listener=listener, takeover=takeover)


def open_run(path: str | Path) -> Run:
    """Open a run directory that exists, finished or not. Changes nothing.

    Raises:
        RunNotFound: There is none.
        DamagedData: Its records are damaged.
    """
    from pipeline.runs.lifecycle import reopen

    return Run(*reopen(str(path)))


def _runtime_only(settings: GivenSettings) -> GivenSettings:
    from pipeline.config.declarations import options
    from pipeline.config.run_config import RUNTIME_FIELDS

    for name in settings:
        if name not in options():
            raise ConfigError(f"{name} is no setting of a run; docs/settings.md has them all")
        if name not in RUNTIME_FIELDS:
            raise ConfigError(f"{name} decides the weights: it cannot change in a run that has begun")
    return settings


class _Log:
    """Writes a run's progress to the log (`pipeline.engine.job.Listener`)."""

    def __init__(self) -> None:
        from lampctl.output.progress import Heartbeat

        self._heartbeat = Heartbeat()

    def step_started(self, step: Step, position: int, total: int) -> None:
        log.info("step %d of %d: %s", position + 1, total, step.name)
        self._heartbeat.begin()

    def step_resumed(self, step: Step) -> None:
        log.info("%s: resumed from its last checkpoint", step.name)

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        line = self._heartbeat.line(done, total, unit, figures)
        if line is not None:
            log.info("%s: %s", step.name, line)

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        log.info("%s: done in %.1f s", step.name, commit.elapsed_s)

    def warn(self, message: str) -> None:
        log.warning("%s", message)
