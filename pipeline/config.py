"""Everything a user may set, resolved once, with where each value came from.

`gather` merges flag > environment > file > preset into raw values; `complete` fills in what is left, knowing
the model, and gives the `RunConfig` that run.json keeps. Identity fields decide the weights: another value in
the same run directory is refused. Free fields may change whenever the run goes on.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import ConfigError
from stages.defaults import TrainingDefaults
from stages.errors import UsageError
from stages.pruners.masks import Pattern

Method = Literal["lamp", "sparsegpt", "alps", "wanda", "magnitude"]
Effort = Literal["low", "medium", "high"]
ENVIRONMENT_PREFIX = "LAMPCTL_"
# LAMPCTL_CACHE places the cache; it is no setting of a run.
_OTHER_VARIABLES = {"LAMPCTL_CACHE"}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "calibration": "pydocs",
        "num_samples": 32,
        "seqlen": 256,
        "epochs": 3,
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
    method: Method = "lamp"
    revision: str | None = None
    alpha: float | None = Field(None, gt=0, le=1)
    beta: float | None = Field(None, ge=0, le=1)
    calibration: str | None = None
    calibration_sampling: Literal["contiguous", "random"] | None = None
    calibration_skip: int = Field(0, ge=0)
    num_samples: int | None = Field(None, ge=1)
    seqlen: int | None = Field(None, ge=2)
    pruner: Literal["sparsegpt", "alps"] | None = None
    effort: Effort | None = None
    epochs: int | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0)
    lr_decay: float | None = Field(None, gt=0, le=1)
    schedule: Literal["exponential", "linear"] | None = None
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
    damping: float = Field(0.01, gt=0)
    column_block: int = Field(128, ge=1)

    evaluate: tuple[str, ...] | None = None
    evaluate_dense: bool = True
    eval_seqlen: int | None = Field(None, ge=2)
    eval_max_tokens: int | None = Field(None, ge=2)

    @field_validator("evaluate", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        # Not split at commas: a regular expression may hold some.
        return (value,) if isinstance(value, str) else value

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


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


class RunConfig(Settings):
    """`Settings` with every default filled in: what run.json keeps.

    A field that the method does not use is None (a magnitude run has no calibration, only LAMP has epochs).
    """

    seqlen: int = Field(ge=2)
    evaluate: tuple[str, ...] = ()
    eval_seqlen: int = Field(ge=2)

    @property
    def n_of_m(self) -> Pattern | None:
        """The N:M pattern, if that is what is asked for."""
        return Pattern.parse(self.pattern) if self.pattern is not None else None

    @property
    def target_sparsity(self) -> float:
        """The share of the prunable weights that is to be masked."""
        pattern = self.n_of_m
        if pattern is not None:
            return pattern.sparsity
        assert self.sparsity is not None
        return self.sparsity

    @property
    def goal(self) -> str:
        """What is asked for, for people: "70%", "2:4, int4"."""
        what = self.pattern or f"{100 * self.target_sparsity:g}%"
        grouped = f" in groups of {self.group_size}" if self.group_size else ""
        return what + (f", int{self.bits}{grouped}" if self.bits else "")

    @property
    def slug(self) -> str:
        """The same for file names: "s70", "2of4-int4"."""
        what = self.pattern.replace(":", "of") if self.pattern else f"s{100 * self.target_sparsity:g}"
        grouped = f"g{self.group_size}" if self.group_size else ""
        return what + (f"-int{self.bits}{grouped}" if self.bits else "")

    def with_free(self, free: Mapping[str, Any]) -> RunConfig:
        """This configuration with other free settings."""
        return RunConfig(**{**self.model_dump(), **free})

    @property
    def free(self) -> dict[str, Any]:
        """The settings that do not change the weights, ready for JSON."""
        return self.model_dump(mode="json", include=set(FREE_FIELDS))

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make the weights, ready for JSON."""
        return self.model_dump(mode="json", exclude=set(FREE_FIELDS))


FREE_FIELDS = ("evaluate", "evaluate_dense", "eval_seqlen", "eval_max_tokens")
LAMP_FIELDS = (
    "pruner",
    "effort",
    "epochs",
    "lr",
    "lr_decay",
    "schedule",
    "loss",
    "hold_aside",
    "refine",
    "refine_epochs",
    "refine_lr",
)
CALIBRATION_FIELDS = ("calibration", "calibration_sampling", "num_samples")


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
        flag = _flag(field)
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


def check_combinations(gathered: Gathered) -> None:
    """Raise ConfigError for settings that exclude each other, with both of their names."""
    settings = gathered.values

    def origin(field: str) -> str:
        where = gathered.origins.get(field, "flag")
        return "" if where == "flag" else f" ({where})"

    if settings.pattern is None and settings.sparsity is None:
        raise ConfigError("--sparsity is missing, or --pattern N:M instead (lampctl run --help has examples)")
    if settings.pattern is not None:
        for field in ("sparsity", "alpha", "beta", "layer_sparsity"):
            if getattr(settings, field) not in (None, {}):
                raise ConfigError(
                    f"--pattern {settings.pattern}{origin('pattern')} fixes the sparsity of every group of every "
                    f"layer: it excludes {_flag(field)}{origin(field)}"
                )
    if settings.group_size is not None and settings.bits is None:
        raise ConfigError(f"--group-size {settings.group_size}{origin('group_size')} is about --bits, which is not set")
    if settings.bits is not None and settings.method == "wanda":
        raise ConfigError(
            f"--bits {settings.bits}{origin('bits')}: Wanda changes no weight that it keeps and so cannot quantize; "
            "use --method lamp, sparsegpt, alps or magnitude"
        )
    if settings.effort is not None and gathered.preset == "paper":
        raise ConfigError(f"--effort {settings.effort}{origin('effort')}: --preset paper fixes the training")
    if settings.refine is False:
        for field in ("refine_epochs", "refine_lr"):
            if getattr(settings, field) is not None:
                raise ConfigError(f"--no-refine{origin('refine')} excludes {_flag(field)}{origin(field)}")


def _flag(field: str) -> str:
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def complete(
    gathered: Gathered, max_positions: int | None, defaults: TrainingDefaults
) -> tuple[RunConfig, dict[str, str], list[str]]:
    """Fill in what nobody gave. Gives the configuration, each field's origin, and notices for the user.

    `defaults.alpha` and `.beta` must be feasible already, and the combination checked. Raises ConfigError where the
    model cannot do what was asked for.
    """
    settings, notices = gathered.values, []
    values, origins = settings.model_dump(), dict(gathered.origins)

    def fill(field: str, value: Any) -> None:
        if values[field] is None:
            values[field] = value

    fill("seqlen", 2048)
    if max_positions is not None and values["seqlen"] > max_positions:
        if gathered.given("seqlen"):
            raise ConfigError(
                f"--seqlen {values['seqlen']}: {settings.model} has {max_positions} positions; "
                f"use --seqlen {max_positions} or less"
            )
        notices.append(f"seqlen is {max_positions}, all the positions that {settings.model} has")
        values["seqlen"] = max_positions
    fill("eval_seqlen", values["seqlen"])
    is_lamp, uses_calibration = settings.method == "lamp", settings.method != "magnitude"
    if settings.pattern is None:
        fill("alpha", defaults.alpha if is_lamp else 1.0)
        fill("beta", defaults.beta if is_lamp else 0.0)
    if is_lamp and values["refine"] is None and (values["refine_epochs"] or values["refine_lr"]):
        values["refine"] = True
    for field in LAMP_FIELDS:
        if is_lamp:
            fill(field, getattr(defaults, field))
        else:
            _drop(field, gathered, values, notices, "it is about --method lamp")
    if is_lamp and not values["refine"]:
        values["refine_epochs"] = values["refine_lr"] = None
        if not values["epochs"]:
            raise ConfigError("--epochs 0 without --refine trains nothing: that is --method sparsegpt")
    if is_lamp and values["schedule"] == "linear":
        _drop("lr_decay", gathered, values, notices, "the linear schedule goes down to 0 step by step")
    if uses_calibration:
        fill("calibration", "c4")
        fill("num_samples", 128)
        fill("calibration_sampling", "random" if values["calibration"] == "c4" else "contiguous")
    else:
        for field in CALIBRATION_FIELDS:
            _drop(field, gathered, values, notices, "magnitude pruning looks at no data")
        values["calibration_skip"] = 0
    fill("evaluate", ("wikitext2",))
    for field in values:
        origins.setdefault(field, "default")
    config = RunConfig(**values)
    check_evaluation(config, max_positions)
    return config, origins, notices


def check_evaluation(config: RunConfig, max_positions: int | None) -> None:
    """Raise ConfigError where the evaluation settings do not fit the model or each other."""
    if max_positions is not None and config.eval_seqlen > max_positions:
        raise ConfigError(f"--eval-seqlen {config.eval_seqlen}: the model has {max_positions} positions")
    if config.eval_max_tokens is not None and config.eval_max_tokens < config.eval_seqlen:
        raise ConfigError(
            f"--eval-max-tokens {config.eval_max_tokens} is less than one window of {config.eval_seqlen} tokens"
        )


def _drop(field: str, gathered: Gathered, values: dict[str, Any], notices: list[str], reason: str) -> None:
    if gathered.given(field):
        notices.append(f"--{field.replace('_', '-')} has no effect: {reason}")
    values[field] = None


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The identity fields whose values differ, as {field: (value of the run, value asked for)}."""
    return {field: (old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field)}
