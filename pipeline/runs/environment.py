"""The environment of a run: versions and device choices that decide the last bits, and whether they may change."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from pipeline.engine.job import Listener
from pipeline.errors import ConfigMismatch
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.run_facts import DeviceRecord, EnvironmentRecord, environment_of
from stages.version import VERSION

if TYPE_CHECKING:
    from stages.machine.device import DeviceChoices


def environment_record(device: DeviceChoices) -> EnvironmentRecord:
    """Versions and device choices that decide the last bits."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "zarr")}
    return EnvironmentRecord(
        python=platform.python_version(), packages={"lampctl": VERSION, **others}, device=DeviceRecord.of(device)
    )


def settle_environment(run: RunDirectory, config: RunConfig, listener: Listener) -> None:
    """Check that this machine and its versions are those of the run, or record that they have changed.

    Raises ConfigMismatch where they differ and the run does not allow that.
    """
    environment, changes = environment_here(run, config)
    if not changes:
        return
    lines = [f"  {change}" for change in changes]
    if not config.allow_environment_change:
        raise ConfigMismatch(
            f"{run.label} was begun elsewhere, and its result could differ in the last bits here:",
            *lines,
            "go on where it was begun, or allow it: the same command with --allow-environment-change (or "
            "LAMPCTL_ALLOW_ENVIRONMENT_CHANGE=1)",
        )
    listener.warn("\n".join(("from here on, the run is done elsewhere:", *lines)))
    run.change_environment(environment.model_dump(mode="json"), changes, config.runtime)
    run.event("environment-changed", changes=changes)


def environment_here(run: RunDirectory, config: RunConfig) -> tuple[EnvironmentRecord, list[str]]:
    """This machine as the run would use it, and how it differs from the environment in force.

    The arithmetic stays that of the run. Threads and the like are chosen again where the device is another one.

    Returns:
        The environment, and one sentence for each difference.
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
        choices = replace(
            chosen,
            batch_tokens=choices.batch_tokens,
            compiles=choices.compiles,
            train_dtype=choices.train_dtype,
        )
    now = environment_record(choices)
    for name, version in _versions(then).items():
        here = _versions(now).get(name)
        if here != version:
            changes.append(f"{name} is {here} here, it was {version}")
    return now, changes


def _versions(environment: EnvironmentRecord) -> dict[str, str]:
    """The versions that may change the last bits: of Python, its minor version."""
    python = ".".join(environment.python.split(".")[:2])
    return {**environment.packages, "python": python}
