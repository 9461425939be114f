"""What run.json says of a run, in typed form: the model, the environment, the budget, the configuration.

The run directory stores these parts without interpreting them. A digest detects corruption, not malicious content, so
they are validated here when they are first read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from pipeline.config.run_config import RunConfig
from pipeline.errors import DamagedData
from pipeline.rundir.records import first_reason
from pipeline.rundir.run_directory import RunDirectory


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=_Part)


class DigestRecord(_Part):
    """Size and sha256 of a file."""

    size: int = Field(ge=0)
    sha256: str


class ModelRecord(_Part):
    """The model that a run prunes."""

    name: str
    source: str  # "hub", "folder", "pickle", "gguf", "wheel"
    revision: str | None
    files: dict[str, DigestRecord]
    model_type: str
    task: str = "language"
    num_blocks: int = Field(ge=1, le=10_000)
    hidden_size: int = Field(ge=1, le=1_000_000)
    max_positions: int | None


class DeviceRecord(_Part):
    """Everything about the device that decides the last bits of a result (`stages.machine.device.DeviceChoices`)."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    num_threads: int = Field(ge=1, le=4096)
    matmul_precision: Literal["highest", "high", "medium"]
    device_name: str
    batch_tokens: int = Field(default=0, ge=0)
    compiles: bool = False


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
    def _has_so_many(self) -> Self:
        if self.num_masked > self.size:
            raise ValueError("more weights are masked than there are")
        return self


class StoredBlockBudget(_Part):
    """Budget of a block in run.json and in commits: that of its prunable layers."""

    layers: tuple[StoredLayerBudget, ...]

    @property
    def size(self) -> int:
        """Number of prunable weights of the block."""
        return sum(layer.size for layer in self.layers)


class IdentityRecord(_Part):
    """What makes two runs the same run: settings, model files and data."""

    settings: dict[str, JsonValue]
    model: dict[str, DigestRecord]
    data: dict[str, JsonValue]


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
    facts_of(run)
    return _config(lambda: RunConfig.recorded(run.manifest.config), f"{run.label}/run.json")


def config_in_force(run: RunDirectory) -> RunConfig:
    """The configuration with the runtime settings that were last in force. Raises DamagedData."""
    config = config_of(run)
    if not run.log:
        return config
    newest = run.log[-1]
    return _config(
        lambda: RunConfig.recorded({**config.as_json(), **newest.free}), f"{run.label}/commits/{newest.number:06d}.json"
    )


def _config(make: Callable[[], RunConfig], where: str) -> RunConfig:
    try:
        return make()
    except ValidationError as error:
        raise DamagedData(_damage(where, error)) from error


def _validated(model: type[P], value: Any, where: str) -> P:
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except (ValidationError, RecursionError) as error:
        raise DamagedData(_damage(where, error)) from error


def _damage(where: str, error: ValidationError | RecursionError) -> str:
    reason = str(error)[:200] if isinstance(error, RecursionError) else first_reason(error)
    return f"{where} is damaged: {reason}. It was written by something else, or by an incompatible version of lampctl"
