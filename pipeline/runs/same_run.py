"""Check that a run directory holds the run, and the data, that a command asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig, differing_fields
from pipeline.errors import ConfigMismatch
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.prepare import Prepared
from pipeline.steps.committed import accuracies_of, measurements_of
from pipeline.steps.run_facts import config_of, facts_of
from pipeline.steps.stage_settings import task_data_of
from stages.models.deciding_files import changed_files

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


def require_same(run: RunDirectory, prepared: Prepared) -> None:
    """Raise ConfigMismatch if the run's identity differs from what is asked for now."""
    identity = facts_of(run).identity
    differing = differing_fields(config_of(run).identity, prepared.config.identity)
    if changed := changed_files(identity.model, prepared.model.files):
        differing[f"model files ({', '.join(changed)})"] = ("as they were", "changed since")
    calibration = prepared.config.calibration
    if calibration and identity.data.get(calibration) != prepared.data.get(calibration):
        differing["calibration text"] = ("as it was", "changed since")
    for name in prepared.config.evaluate:
        require_same_data(run, name, prepared.data[name])
    if prepared.config.tasks:
        require_same_rows(run, prepared.config)
    if differing:
        lines = [f"  {field}: {old!r} there, {new!r} asked for" for field, (old, new) in differing.items()]
        raise ConfigMismatch(
            f"{run.label} holds another run:",
            *lines,
            "use another --run-dir, or the same settings to resume that run",
        )


def require_same_data(run: RunDirectory, source: str, digest: SourceDigest | None) -> None:
    """Raise ConfigMismatch if the run was evaluated on other data under the name of this source."""
    for measured in measurements_of(run):
        if measured.source == source and measured.source_digest != digest:
            raise ConfigMismatch(
                f"{source} has changed since {run.label} was evaluated on it: give the new data another name, so "
                "that its results stand beside the old ones"
            )


def require_same_rows(run: RunDirectory, config: RunConfig) -> None:
    """Raise ConfigMismatch if the run has accuracies measured on other rows in the same folder."""
    data = task_data_of(config)
    for measured in accuracies_of(run):
        if data is None or measured.task_data != config.task_data or measured.task not in config.tasks:
            continue
        if measured.task_data_digest != data.digest(measured.task):
            raise ConfigMismatch(
                f"the rows of {measured.task} in {config.task_data} have changed since {run.label} was evaluated on "
                "them: put the new ones into another folder, so that their results stand beside the old ones"
            )
