"""What run.json says of a run, in typed form: the model, the environment, the budget, the configuration.

The run directory stores these parts without interpreting them. A digest detects corruption, not malicious content, so
they are validated here when they are first read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.declarations import with_current_names
from pipeline.config.run_config import RUNTIME_FIELDS, RunConfig
from pipeline.errors import DamagedData
from pipeline.rundir.records import Bytes, JsonObject, Sha256, first_reason
from pipeline.rundir.run_directory import RunDirectory
from stages.tasks.registry import UNNAMED_TASK

if TYPE_CHECKING:
    from stages.machine.device import DeviceChoices
    from stages.models.base import BlockModel
    from stages.sparsity.budget import BlockBudget


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=_Part)


class DigestRecord(_Part):
    """Size and sha256 of a file."""

    size: Bytes
    sha256: Sha256


class ModelRecord(_Part):
    """The model that a run prunes."""

    name: str
    source: str  # "hub", "folder", "pickle", "gguf", "wheel"
    revision: str | None
    files: dict[str, DigestRecord]
    model_type: str
    task: str = UNNAMED_TASK
    num_blocks: int = Field(ge=1, le=10_000)
    hidden_size: int = Field(ge=1, le=1_000_000)
    max_positions: int | None = Field(ge=1, le=2**40)

    @classmethod
    def of(cls, model: BlockModel) -> Self:
        """The record of a model."""
        folder = model.source
        return cls(
            name=folder.name,
            source=folder.source,
            revision=folder.revision,
            files={name: DigestRecord(size=file.size, sha256=file.sha256) for name, file in folder.files.items()},
            model_type=model.name,
            task=model.task,
            num_blocks=model.num_blocks,
            hidden_size=model.hidden_size,
            max_positions=model.max_positions,
        )


class DeviceRecord(_Part):
    """Everything about the device that decides the last bits of a result (`stages.machine.device.DeviceChoices`)."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    num_threads: int = Field(ge=1, le=4096)
    matmul_precision: Literal["highest", "high", "medium"]
    device_name: str
    batch_tokens: int = Field(default=0, ge=0, le=2**40)
    compiles: bool = False
    train_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @classmethod
    def of(cls, choices: DeviceChoices) -> Self:
        """The record of the choices."""
        return cls.model_validate(asdict(choices))


class EnvironmentRecord(_Part):
    """Versions and device that a run is done with."""

    python: str
    packages: dict[str, str]
    device: DeviceRecord


class StoredLayerBudget(_Part):
    """Budget of a layer in run.json and in commits: how many of its weights are masked."""

    name: str
    role: str | None
    size: int = Field(ge=0, lt=2**50)
    num_masked: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.num_masked > self.size:
            raise ValueError("more weights are masked than there are")
        return self


class StoredBlockBudget(_Part):
    """Budget of a block in run.json and in commits: that of its prunable layers."""

    layers: tuple[StoredLayerBudget, ...]

    @classmethod
    def of(cls, budget: BlockBudget) -> Self:
        """The record of a block's budget."""
        return cls.model_validate(asdict(budget))

    @property
    def size(self) -> int:
        """Number of prunable weights of the block."""
        return sum(layer.size for layer in self.layers)


class IdentityRecord(_Part):
    """What makes two runs the same run: settings, model files and data."""

    settings: JsonObject
    model: dict[str, DigestRecord]
    data: dict[str, JsonObject | None]  # digests of data sources, by name; null: it has none


class RunFacts(_Part):
    """The parts of run.json, validated."""

    provenance: dict[str, str]
    identity: IdentityRecord
    model: ModelRecord
    environment: EnvironmentRecord
    budget: tuple[StoredBlockBudget, ...]
    plan: tuple[str, ...]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.budget) != self.model.num_blocks or len(self.plan) < self.model.num_blocks:
            raise ValueError("the budget, the plan and the number of blocks do not fit together")
        if self.identity.model != self.model.files:
            raise ValueError("the model's files are not those of the run's identity")
        return self


_FACTS: dict[str, RunFacts] = {}  # by the digest of run.json


def facts_of(run: RunDirectory) -> RunFacts:
    """What run.json says of a run. Raises DamagedData where it does not say what lampctl writes."""
    manifest = run.manifest
    if manifest.digest not in _FACTS:
        parts = {name: getattr(manifest, name) for name in RunFacts.model_fields}
        _FACTS[manifest.digest] = _validated(RunFacts, parts, f"{run.label}/run.json")
    return _FACTS[manifest.digest]


def environment_of(run: RunDirectory) -> EnvironmentRecord:
    """Versions and device for the next step. Raises DamagedData."""
    return _validated(EnvironmentRecord, run.environment, f"the environment of {run.label}")


def config_of(run: RunDirectory) -> RunConfig:
    """The configuration that a run began with. Raises DamagedData where run.json holds none."""
    where, identity = f"{run.label}/run.json", facts_of(run).identity.settings
    config = _config(run.manifest.config, where)
    _require_same(config, identity, where)
    return config


def config_in_force(run: RunDirectory) -> RunConfig:
    """The configuration with the runtime settings that were last in force. Raises DamagedData."""
    config = config_of(run)
    if not run.log:
        return config
    newest = run.log[-1]
    where = f"{run.label}/commits/{newest.number:06d}.json"
    fixed = [name for name in newest.free if name not in RUNTIME_FIELDS]
    if fixed:
        raise DamagedData(_damage(where, f"{fixed[0][:100]} is no runtime setting"))
    return _config({**config.as_json(), **newest.free}, where)


def _config(recorded: JsonObject, where: str) -> RunConfig:
    """The configuration that was recorded. Its constraints are those of the settings. Raises DamagedData."""
    try:
        config = RunConfig.recorded(recorded)
    except ValidationError as error:
        raise DamagedData(_damage(where, first_reason(error))) from error
    _require_same(config, recorded, where)
    return config


def _require_same(config: RunConfig, recorded: JsonObject, where: str) -> None:
    """Raise DamagedData unless lampctl would record the configuration like this: validation converts values."""
    again = config.as_json()
    for name, value in with_current_names(recorded).items():
        if name not in again or value != again[name] or isinstance(value, bool) != isinstance(again[name], bool):
            raise DamagedData(_damage(where, f"{name[:100]} is {str(value)[:100]!r}"))


def _validated(model: type[P], value: object, where: str) -> P:
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except (ValidationError, RecursionError) as error:
        reason = first_reason(error) if isinstance(error, ValidationError) else str(error)[:200]
        raise DamagedData(_damage(where, reason)) from error


def _damage(where: str, reason: str) -> str:
    return f"{where} is damaged: {reason}. It was written by something else, or by an incompatible version of lampctl"
