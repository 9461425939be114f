"""What a user may set, and where each value came from: flag > environment > file > preset."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.config.quantities import parse_duration, parse_size
from pipeline.errors import ConfigError
from stages.errors import UsageError
from stages.metrics.harness_tasks import LAYOUT
from stages.pruners.registry import LAMP, lamp_pruners, method_names
from stages.sparsity.nm_pattern import Pattern
from stages.tasks.base import Points

Effort = Literal["low", "medium", "high"]
ENVIRONMENT_PREFIX = "LAMPCTL_"
USUAL_TASKS = "zero-shot"  # in --tasks: the seven that the field gives the mean of
_LONGEST_NAME = 255  # bytes, in every file system in use
# LAMPCTL_CACHE places the cache; it is no setting of a run.
_OTHER_VARIABLES = {"LAMPCTL_CACHE"}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "calibration": "pydocs",
        "num_samples": 32,
        "seqlen": 256,
        "effort": "low",
        "evaluate": ("pydocs",),
    },
    "paper": {
        "calibration": "c4",
        "num_samples": 128,
        "seqlen": 2048,
        "evaluate": ("wikitext2", "ptb", "c4"),
    },
}


class Settings(BaseModel):
    """What a user may set. None means: the default, which may depend on the model and the sparsity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1)
    sparsity: float | None = Field(None, gt=0, lt=1)
    pattern: str | None = None
    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | None = Field(None, ge=1)
    method: str = LAMP
    revision: str | None = None
    trust_remote_code: bool = False
    alpha: float | None = Field(None, gt=0, le=1)
    beta: float | None = Field(None, ge=0, le=1)
    budget: Literal["uniform", "outliers"] | None = None
    budget_spread: float | None = Field(None, gt=0, lt=1)
    calibration: str | None = None
    calibration_sampling: Literal["contiguous", "random"] | None = None
    calibration_skip: int = Field(0, ge=0)
    num_samples: int | None = Field(None, ge=1)
    seqlen: int | None = Field(None, ge=2)
    pruner: str | None = None
    effort: Effort | None = None
    epochs: int | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0)
    lr_decay: float | None = Field(None, gt=0, le=1)
    loss: Literal["mse", "token"] | None = None
    hold_aside: bool | None = None
    refine: bool | None = None
    refine_epochs: int | None = Field(None, ge=1)
    refine_lr: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    export_dtype: Literal["original", "float32", "bfloat16", "float16"] = "original"
    ignore: tuple[str, ...] = ()
    layer_sparsity: dict[str, float] = {}
    threads: int | None = Field(None, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    compile: bool | None = None
    damping: float = Field(0.01, gt=0)
    column_block: int = Field(128, ge=1)

    evaluate: tuple[str, ...] | None = None
    evaluate_dense: bool = True
    eval_seqlen: int | None = Field(None, ge=2)
    eval_max_tokens: int | None = Field(None, ge=2)
    eval_points: Points | None = None
    eval_max_images: int | None = Field(None, ge=1)
    tasks: tuple[str, ...] | None = None
    task_data: str | None = None
    task_limit: int | None = Field(None, ge=1)
    keep_activations: bool = False
    memory_limit: str | None = None
    checkpoint_minutes: float = Field(10.0, ge=0)
    scratch_dir: str | None = None
    max_runtime: str | None = None
    watch_preemption: Literal["none", "aws", "gcp"] = "none"
    preemption_url: str | None = None
    allow_environment_change: bool = False

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        if method not in method_names():
            raise ValueError(f"choose one of {', '.join(method_names())}")
        return method

    @field_validator("pruner")
    @classmethod
    def _check_pruner(cls, pruner: str | None) -> str | None:
        if pruner is not None and pruner not in lamp_pruners():
            raise ValueError(f"choose one of {', '.join(lamp_pruners())}")
        return pruner

    @field_validator("evaluate", "tasks", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _name_usual_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if tasks is None else split_tasks(",".join(tasks))

    @field_validator("preemption_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is not None and "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError("an address with a name or password would be written into the run directory")
        return url

    @field_validator("max_runtime", mode="before")
    @classmethod
    def _check_duration(cls, value: Any) -> Any:
        if value is None or str(value).strip().lower() in ("", "none"):
            return None
        try:
            parse_duration(str(value))
        except ConfigError as error:
            raise ValueError(str(error).partition(": ")[2]) from error
        return str(value)

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if value is None or str(value).strip().lower() in ("", "none"):
            return None
        parse_size(str(value))
        return str(value)

    @field_validator("scratch_dir", "task_data", mode="before")
    @classmethod
    def _from_here(cls, value: Any) -> Any:
        if not isinstance(value, str | Path) or not str(value):
            return None
        if "\0" in str(value) or any(len(part.encode()) > _LONGEST_NAME for part in Path(value).parts):
            raise ValueError("no file system has such a folder")
        return str(Path(value).expanduser().absolute())  # a run is resumed from anywhere

    @field_validator("ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        # Not split at commas: a regular expression may hold some.
        return (value,) if isinstance(value, str) else value

    @field_validator("pattern", mode="before")
    @classmethod
    def _require_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('a pattern in a file needs quotes, as in "2:4" (without, YAML reads a number)')
        return value

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            return str(Pattern.parse(pattern))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("ignore")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            _check_regex(pattern)
        return patterns

    @field_validator("layer_sparsity")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, float]) -> dict[str, float]:
        for pattern, sparsity in overrides.items():
            _check_regex(pattern)
            if not 0 <= sparsity <= 1:
                raise ValueError(f"the sparsity of {pattern} is {sparsity}; it must lie in [0, 1]")
        return overrides


def split_tasks(tasks: str) -> tuple[str, ...]:
    """The names of zero-shot tasks in a list with commas, each once, the seven usual ones by their common name."""
    named = [task.strip() for task in tasks.split(",") if task.strip()]
    return tuple(dict.fromkeys(name for task in named for name in (LAYOUT if task == USUAL_TASKS else (task,))))


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class Gathered:
    """The settings somebody gave, and who: "flag", "environment LAMPCTL_X", "file PATH" or "preset NAME"."""

    values: Settings
    origins: dict[str, str]
    preset: str | None

    def given(self, field: str) -> bool:
        """Whether the user, rather than a preset or a default, gave this field."""
        return not self.origins.get(field, "preset").startswith("preset")


def gather(
    flags: Mapping[str, Any],
    config_file: Path | None = None,
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Gathered:
    """Merge flag > environment > file > preset. `flags` holds those that were given (None: not given).

    Raises ConfigError with every wrong value, its origin and what would be right.
    """
    from_file = _read_config_file(config_file) if config_file else {}
    from_environment = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _OTHER_VARIABLES and value
    }
    presets = (preset, from_environment.pop("preset", None), from_file.pop("preset", None))
    preset = next((name for name in presets if name is not None), None)
    if preset is not None and preset not in [*PRESETS]:
        raise ConfigError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    layers = (
        (PRESETS[preset] if preset else {}, lambda _: f"preset {preset}"),
        (from_file, lambda _: f"file {config_file}"),
        (from_environment, lambda field: f"environment {ENVIRONMENT_PREFIX}{field.upper()}"),
        ({field: value for field, value in flags.items() if value is not None}, lambda _: "flag"),
    )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in layers:
        for field, value in layer.items():
            values[field], origins[field] = value, origin(field)
    try:
        return Gathered(Settings(**values), origins, preset)
    except ValidationError as error:
        raise ConfigError(explain(error, origins)) from error


def _read_config_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    try:
        if path.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix in {".yaml", ".yml"}:
            content = yaml.safe_load(text)
        else:
            raise ConfigError(f"--config {path}: the name must end in .toml, .yaml or .yml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected settings, one `name: value` a line")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """What is wrong with each setting, one a line, named as the user knows it and with where it came from."""
    lines = []
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        flag = flag_of(field)
        if problem["type"] == "missing":
            lines.append(f"{flag} is missing (lampctl run --help has examples)")
        elif problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(Settings.model_fields))
            lines.append(f"{field} ({origins.get(field)}) is no setting of a run; known: preset, {known}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            origin = origins.get(field, "flag")
            where = "" if origin == "flag" else f" ({origin})"
            hint = " (a share, not a percentage: 70% is 0.7)" if problem["type"] == "less_than" else ""
            lines.append(f"{flag} {problem['input']}{where}: {message[0].lower()}{message[1:]}{hint}")
    return "\n".join(lines)


def flag_of(field: str) -> str:
    """The setting's name as the command line has it."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")
