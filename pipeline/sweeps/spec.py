"""Specification of a sweep: grids of settings, or ranges that a search samples from."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pipeline.config.adjust import sibling, with_absolute_paths
from pipeline.config.declarations import flag_of, options
from pipeline.config.gather import Gathered
from pipeline.config.names import current_name, suggestion
from pipeline.config.run_config import RUNTIME_FIELDS
from pipeline.config.settings import Settings
from pipeline.errors import ConfigError
from pipeline.rundir.records import JsonObject
from stages.pruners.registry import LAMP

# (low, high, logarithmic scale): the ranges that the paper varies (its Figs. 3-8).
_USUAL = {
    "alpha": (0.5, 1.0, False),
    "beta": (0.0, 0.4, False),
    "lr": (1e-4, 5e-3, True),
    "refine_lr": (1e-4, 5e-3, True),
    "lr_decay": (0.7, 1.0, False),
}
_NUMBERS = {"sparsity", "budget_spread", "damping", *_USUAL}
_MOST_VALUES = 1000
_LONGEST = 40  # most characters of a value in a trial's name
_NEVER = ("model", "revision", "trust_remote_code", *RUNTIME_FIELDS)


class Range(BaseModel):
    """The range of a number that a search samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str
    low: float
    high: float
    is_log: bool = False


class SweepSpec(BaseModel):
    """The record `sweep.json`: the settings that all trials share, and those that differ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    settings: JsonObject
    origins: dict[str, str]
    preset: str | None
    grid: dict[str, tuple[str, ...]] = {}
    points: tuple[JsonObject, ...] = ()  # the trials one by one, in place of a grid
    search: tuple[Range, ...] = ()
    num_trials: int | None = Field(None, ge=1)  # only for a search
    database: str | None = None  # only for a search; None: a file in the sweep's folder

    @property
    def gathered(self) -> Gathered:
        """The settings that all trials share."""
        return Gathered(Settings.recorded(self.settings), self.origins, self.preset)

    @property
    def fields(self) -> tuple[str, ...]:
        """The settings that differ between trials."""
        named = dict.fromkeys(field for point in self.points for field in point)
        return (*self.grid, *named, *(found.field for found in self.search))


def new_spec(
    gathered: Gathered, grids: Sequence[str], searches: str | None, num_trials: int | None, database: str | None
) -> SweepSpec:
    """Build the specification from flags. Raises ConfigError that names the wrong flag."""
    gathered = with_absolute_paths(gathered)  # a sweep is resumed from anywhere
    grid = dict(_axis(text) for text in grids)
    if len(grid) < len(grids):
        raise ConfigError("--grid names one setting twice: give it all its values in one")
    ranges = tuple(_range(text) for text in searches.split(",") if text.strip()) if searches else ()
    if not grid and not ranges:
        raise ConfigError(
            "a sweep needs something to vary: --grid sparsity=0.5,0.6,0.7 or --search alpha,lr --trials 20"
        )
    if grid and ranges:
        raise ConfigError("--grid excludes --search: a search chooses its own values")
    if ranges and num_trials is None:
        raise ConfigError("--search needs --trials N")
    if not ranges and (num_trials is not None or database is not None):
        raise ConfigError("--trials and --storage require --search")
    if ranges and not (gathered.values.evaluate is None or gathered.values.evaluate):
        raise ConfigError("--search needs --evaluate: it optimizes the metric on the first data source")
    repeated = [found.field for found in ranges if [other.field for other in ranges].count(found.field) > 1]
    if repeated:
        raise ConfigError(f"--search names {repeated[0]} twice")
    for found in ranges:
        for bound in (found.low, found.high):
            settings_at(gathered, {found.field: bound})
    values = gathered.values.as_json()
    spec = SweepSpec(
        settings=values,
        origins=gathered.origins,
        preset=gathered.preset,
        grid=grid,
        search=ranges,
        num_trials=num_trials,
        database=database,
    )
    for point in points_of(spec):
        settings_at(gathered, point)  # before anything is written
    return spec


def points_of(spec: SweepSpec) -> list[JsonObject]:
    """Settings of each trial: every combination of the grid in order, or the listed points."""
    if spec.points:
        return [dict(point) for point in spec.points]
    names = list(spec.grid)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*spec.grid.values())]


def settings_at(gathered: Gathered, point: Mapping[str, JsonValue]) -> Gathered:
    """Settings of one trial. Raises ConfigError if a value is not valid for its setting."""
    values = {**gathered.values.as_json(), **point}
    origins = {**gathered.origins, **dict.fromkeys(point, "flag")}
    changed = Gathered(Settings.of(values, origins), origins, gathered.preset)
    if changed.values.method == LAMP:
        return changed
    plain = sibling(changed, changed.values.method)
    # The settings of a baseline, except those that the sweep sets.
    kept = {field: getattr(changed.values, field) for field in ("alpha", "beta", "evaluate_dense") if field in point}
    return replace(plain, values=plain.values.changed(**kept))


def name_of(point: Mapping[str, JsonValue]) -> str:
    """Folder name of a trial, such as "sparsity-0.5_method-lamp"."""
    return "_".join(f"{field}-{_plain(value)}" for field, value in point.items())


def _plain(value: JsonValue) -> str:
    """A value as part of a file name. A digest replaces lost characters, so that two values never share a name."""
    text = repr(value) if isinstance(value, float) else str(value)
    plain = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "of" if c == ":" else "-" for c in text)
    if len(plain) <= _LONGEST and text in (plain, plain.replace("of", ":")):
        return plain
    return f"{plain[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    field, values = _split(text, "--grid")
    found = tuple(dict.fromkeys(_values(field, values)))
    if field == "calibration":
        from stages.data.registry import parse_source

        found = tuple(parse_source(name).name for name in found)  # with absolute paths
    if not found:
        raise ConfigError(f"--grid {text}: there is no value")
    return field, found


def _values(field: str, text: str) -> Iterable[str]:
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3:
            if part.strip():
                yield part.strip()
            continue
        try:
            start, stop, step = (Decimal(number.strip()) for number in numbers)
        except InvalidOperation:
            raise ConfigError(f"--grid {field}={part}: START:STOP:STEP are three numbers") from None
        if not all(number.is_finite() for number in (start, stop, step)) or step <= 0 or stop < start:
            raise ConfigError(f"--grid {field}={part}: STEP must be above 0, and STOP no less than START")
        if (stop - start) / step >= _MOST_VALUES:
            raise ConfigError(f"--grid {field}={part} has over {_MOST_VALUES} values")
        for number in range(int((stop - start) / step) + 1):
            yield str(start + number * step)


def _range(text: str) -> Range:
    field, equals, bounds = text.strip().partition("=")
    field = _known(field, "--search")
    if field not in _NUMBERS:
        raise ConfigError(f"--search {field}: a search samples numbers; choose from {', '.join(sorted(_NUMBERS))}")
    if not equals:
        if field not in _USUAL:
            raise ConfigError(f"--search {field}: give the range as {field}=LOW:HIGH or {field}=LOW:HIGH:log")
        low, high, is_log = _USUAL[field]
        return Range(field=field, low=low, high=high, is_log=is_log)
    parts = bounds.split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
    except (ValueError, IndexError):
        raise ConfigError(f"--search {text}: say {field}=LOW:HIGH or {field}=LOW:HIGH:log") from None
    is_log = parts[2:] == ["log"]
    if (parts[2:] and not is_log) or not low < high or not math.isfinite(high - low) or (is_log and low <= 0):
        raise ConfigError(f"--search {text}: LOW must be below HIGH, and above 0 for log")
    return Range(field=field, low=low, high=high, is_log=is_log)


def _split(text: str, flag: str) -> tuple[str, str]:
    field, equals, values = text.partition("=")
    if not equals:
        raise ConfigError(f"{flag} {text}: say SETTING=VALUE,VALUE,... or SETTING=START:STOP:STEP")
    return _known(field, flag), values


def _known(field: str, flag: str) -> str:
    name = current_name(field.strip().lstrip("-").replace("-", "_"))
    varied = sorted(set(options()) - set(_NEVER))
    if name not in options():
        raise ConfigError(f"{flag} {field} is not a setting{suggestion(name, varied)}")
    if name not in varied:
        known = ", ".join(flag_of(found).removeprefix("--") for found in varied)
        raise ConfigError(f"{flag} {field}: a sweep cannot vary it; choose from {known}")
    return name
