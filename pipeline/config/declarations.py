"""What is declared of each setting in `pruning_settings` and `job_settings`: type, help, flag, variable, former names.

The command line (`lampctl.cli.options`), environment variables, the configuration file and its JSON Schema, the docs,
and a run's identity all come from here. `pipeline.config.settings` has the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pipeline.config.job_settings import JobSettings
from pipeline.config.option import Option
from pipeline.config.pruning_settings import PruningSettings

ENVIRONMENT_PREFIX = "LAMPCTL_"

# Settings by name, as a user gave them: text of a flag, numbers of a file. `Settings.of` validates them.
GivenSettings = Mapping[str, object]
V = TypeVar("V")


@cache
def hints() -> dict[str, Any]:
    """The annotation of each setting, in the order of their declaration."""
    declared = (get_type_hints(kind, include_extras=True) for kind in (PruningSettings, JobSettings))
    return {name: hint for found in declared for name, hint in found.items()}


@cache
def options() -> dict[str, Option]:
    """The `Option` of each setting."""
    return {
        name: next(part for part in get_args(hint)[1:] if isinstance(part, Option)) for name, hint in hints().items()
    }


def type_of(name: str) -> Any:
    """The type of a setting without annotations: ``float | None``."""
    return _plain(hints()[name])


def _plain(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    inner = get_args(hint)
    if type(None) in inner:
        return _plain(inner[0] if inner[0] is not type(None) else inner[1])
    return hint


@cache
def former_names() -> dict[str, str]:
    """The current name of a setting, by its former name."""
    return {alias: name for name, option in options().items() for alias in option.aliases}


def with_current_names(values: Mapping[str, V]) -> dict[str, V]:
    """The values under the current names of their settings. A value under the current name wins."""
    renamed = {former_names()[name]: value for name, value in values.items() if name in former_names()}
    return {**renamed, **{name: value for name, value in values.items() if name not in former_names()}}


def names_where(**wanted: Any) -> tuple[str, ...]:
    """The settings whose `Option` has these attributes: ``names_where(scope="runtime")``."""
    return tuple(
        name
        for name, option in options().items()
        if all(getattr(option, attribute) == value for attribute, value in wanted.items())
    )


def variable_of(name: str) -> str:
    """The setting's environment variable."""
    return ENVIRONMENT_PREFIX + name.upper()


def flag_of(name: str) -> str:
    """The setting's flag on the command line."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")
