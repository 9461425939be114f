"""The run whose pruned blocks another one takes over, to distill them (--from-run)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.config.run_config import (
    Recorded,
    RunConfig,
    as_in_origin,
    differing_fields,
    settings_of_distillation,
)
from pipeline.errors import ConfigError, ConfigMismatch, NotARun, RunNotFound
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps import payloads
from pipeline.steps.run_facts import ModelRecord, config_of, facts_of

if TYPE_CHECKING:
    from stages.data.base import SourceDigest


def origin_of(config: RunConfig) -> RunDirectory | None:
    """The run whose blocks are taken over; None: every block is pruned here.

    Raises:
        ConfigError: It is not there.
    """
    if config.from_run is None:
        return None
    try:
        return RunDirectory.open(config.from_run)
    except (RunNotFound, NotARun) as error:
        raise ConfigError(f"--from-run {config.from_run}: {error}; this run needs its blocks") from error


def require_same_samples(origin: RunDirectory, config: RunConfig, data: Mapping[str, SourceDigest | None]) -> None:
    """Raise ConfigMismatch if the calibration source has changed since the origin began. data: digests by source."""
    source = config.calibration
    theirs = config_of(origin).calibration
    if theirs is not None and source is not None and facts_of(origin).identity.data.get(source) != data.get(source):
        raise ConfigMismatch(
            f"--from-run {origin.label}: {source} has changed since that run began: put the old data back, or leave "
            "--from-run out"
        )


def settled_with(origin: RunDirectory, config: RunConfig, origins: Mapping[str, str], model: ModelRecord) -> RunConfig:
    """The configuration with the defaults that the origin began with.

    Raises:
        ConfigMismatch: The origin has another model, other settings than those of distillation, or no pruned blocks.
    """
    recorded = Recorded(config_of(origin), facts_of(origin).provenance)
    config = as_in_origin(config, origins, recorded)
    own = settings_of_distillation(recorded.config)
    theirs, ours = recorded.config.identity, config.identity
    differing = {name: pair for name, pair in differing_fields(theirs, ours).items() if name not in own}
    if facts_of(origin).identity.model != model.files:
        differing["model"] = (facts_of(origin).model.name, "other files")
    if differing:
        lines = [f"  {field}: {old!r} there, {new!r} asked for" for field, (old, new) in differing.items()]
        raise ConfigMismatch(
            f"--from-run {origin.label}: its blocks are not those of this run:",
            *lines,
            "give the same settings, or leave --from-run out",
        )
    last = payloads.pruned(facts_of(origin).model.num_blocks - 1).name
    if not any(last in commit.payloads for commit in origin.commits):
        raise ConfigMismatch(
            f"--from-run {origin.label}: its last block is not pruned yet; finish it with lampctl resume {origin.label}"
        )
    return config
