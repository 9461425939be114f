"""Conversions and checks of single settings. Each raises ValueError with what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.config.quantities import parse_duration, parse_size
from pipeline.errors import ConfigError
from stages.errors import UsageError
from stages.metrics.registry import METRICS
from stages.pruners.registry import lamp_pruners, method_names

SEARCHED = "auto"  # the rate of distillation is searched for on the model
ZERO_SHOT = "zero-shot"  # in --tasks: the seven tasks whose mean papers report
_LONGEST_NAME = 255  # bytes, in every file system in use


def split_commas(value: Any) -> Any:
    """A list separated by commas, as a tuple."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def one_or_many(value: Any) -> Any:
    """A single string as a tuple of one. Not split at commas: a regular expression may contain them."""
    return (value,) if isinstance(value, str) else value


def split_tasks(tasks: str) -> tuple[str, ...]:
    """Names of zero-shot tasks separated by commas, without duplicates. "zero-shot" stands for the usual seven."""
    from stages.metrics.harness_tasks import LAYOUT

    named = [task.strip() for task in tasks.split(",") if task.strip()]
    return tuple(dict.fromkeys(name for task in named for name in (LAYOUT if task == ZERO_SHOT else (task,))))


def expand_tasks(tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of zero-shot tasks with "zero-shot" replaced by the usual seven."""
    return None if tasks is None else split_tasks(",".join(tasks))


def known_method(method: str) -> str:
    """Check a method: LAMP or a pruner of the registry."""
    if method not in method_names():
        raise ValueError(f"choose one of {', '.join(method_names())}")
    return method


def known_pruner(pruner: str | None) -> str | None:
    """Check a pruner that LAMP can use."""
    if pruner is not None and pruner not in lamp_pruners():
        raise ValueError(f"choose one of {', '.join(lamp_pruners())}")
    return pruner


def known_metrics(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Metrics of the registry, each once."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"{name}: choose from {', '.join(METRICS.names)}")
    return tuple(dict.fromkeys(metrics))


def learning_rate(value: Any) -> Any:
    """A learning rate: a number, or "1%" for one relative to each tensor (`stages.training.rates`)."""
    if not isinstance(value, str | int | float):
        return value
    from stages.training.rates import Rate

    try:
        rate = Rate.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return str(rate) if rate.is_relative else rate.value


def searched_rate(value: Any) -> Any:
    """A learning rate, or "auto" for one that is searched for on the model."""
    return value if value == SEARCHED else learning_rate(value)


def quoted_pattern(value: Any) -> Any:
    """Refuse a pattern that YAML has read as a number: without quotes, 2:4 is a number in base 60."""
    if isinstance(value, int):
        raise ValueError('a pattern in a file needs quotes, as in "2:4" (without, YAML reads a number)')
    return value


def valid_pattern(pattern: str | None) -> str | None:
    """Check an N:M pattern, as `stages.sparsity.nm_pattern` reads it."""
    if pattern is None:
        return None
    from stages.sparsity.nm_pattern import Pattern

    try:
        return str(Pattern.parse(pattern))
    except UsageError as error:
        raise ValueError(str(error)) from error


def valid_regexes(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Check that regular expressions compile."""
    for pattern in patterns:
        _require_regex(pattern)
    return patterns


def valid_overrides(overrides: dict[str, float]) -> dict[str, float]:
    """Check sparsities in [0, 1] by regular expression."""
    for pattern, sparsity in overrides.items():
        _require_regex(pattern)
        if not 0 <= sparsity <= 1:
            raise ValueError(f"the sparsity of {pattern} is {sparsity}; it must be in [0, 1]")
    return overrides


def _require_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def absolute_folder(value: Any) -> Any:
    """A folder as an absolute path, since a run can be resumed from another folder. None for an empty name."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | Path):
        raise ValueError("this is not the name of a folder")
    if "\0" in str(value) or any(len(part.encode()) > _LONGEST_NAME for part in Path(value).parts):
        raise ValueError("no file system accepts this name")
    return str(Path(value).expanduser().absolute())


def duration_or_none(value: Any) -> Any:
    """Check a duration such as 3h30m; it stays text. None for "none" or an empty text: no limit."""
    if value is None or str(value).strip().lower() in ("", "none"):
        return None
    try:
        parse_duration(str(value))
    except ConfigError as error:
        raise ValueError(str(error).partition(": ")[2]) from error
    return str(value)


def size_or_none(value: Any) -> Any:
    """Check a size such as 8GB; it stays text. None for "none" or an empty text: no limit."""
    if value is None or str(value).strip().lower() in ("", "none"):
        return None
    parse_size(str(value))
    return str(value)


def without_credentials(url: str | None) -> str | None:
    """Refuse an address with a user name or password in it."""
    if url is not None and "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "this address contains a user name or password, which the run directory would record; leave them out"
        )
    return url
