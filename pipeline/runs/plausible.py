"""Whether run.json says what lampctl writes: a digest shows that a file is whole, not that it means well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.run_config import RunConfig
from pipeline.errors import DamagedData
from pipeline.rundir.run_directory import RunDirectory

_STRANGE = "No lampctl writes that: it was made by something else, or by a version that is not this one"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Digest(_Part):
    size: int = Field(ge=0)
    sha256: str


class _Model(_Part):
    name: str
    source: str
    revision: str | None
    files: dict[str, _Digest]
    model_type: str
    num_blocks: int = Field(ge=1, le=10_000)
    hidden_size: int = Field(ge=1, le=1_000_000)
    max_positions: int | None


class _Device(_Part):
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    num_threads: int = Field(ge=1, le=4096)
    matmul_precision: Literal["highest", "high", "medium"]
    device_name: str


class _Environment(_Part):
    python: str
    packages: dict[str, str]
    device: _Device


class _LayerBudget(_Part):
    name: str
    role: str | None
    size: int = Field(ge=0, lt=2**50)
    num_masked: int = Field(ge=0)

    @model_validator(mode="after")
    def _has_so_many(self) -> Self:
        if self.num_masked > self.size:
            raise ValueError("more weights are masked than there are")
        return self


class _BlockBudget(_Part):
    layers: list[_LayerBudget]


class _Identity(_Part):
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]


class _Manifest(_Part):
    provenance: dict[str, str]
    identity: _Identity
    model: _Model
    environment: _Environment
    budget: list[_BlockBudget]
    plan: list[str]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.budget) != self.model.num_blocks or len(self.plan) < self.model.num_blocks:
            raise ValueError("the budget, the plan and the number of blocks do not fit together")
        return self


def configuration_of(run: RunDirectory) -> RunConfig:
    """The configuration that a run began with. Raises DamagedData where run.json makes no sense."""
    manifest = run.manifest
    where = f"{run.label}/run.json"
    with making_sense(where):
        _Manifest.model_validate(manifest.model_dump(mode="python"))
        _Environment.model_validate(run.environment)
        return RunConfig(**manifest.config)


@contextmanager
def making_sense(where: str) -> Iterator[None]:
    """DamagedData, naming `where`, for what records hold and no lampctl has written."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DamagedData(f"{where} is damaged: {field} {first['msg'][:200]}. {_STRANGE}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, AssertionError) as error:
        raise DamagedData(f"{where} is damaged ({type(error).__name__}: {str(error)[:200]}). {_STRANGE}") from error
