"""All settings of a run. Each is declared once, in `pruning_settings` or `job_settings`.

The command line (`lampctl.cli.options`), environment variables, the configuration file and its JSON Schema, the docs,
and a run's identity all come from the declarations. Pydantic validates the values when a command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

from pipeline.config.job_settings import JobSettings
from pipeline.config.option import Option
from pipeline.config.pruning_settings import PruningSettings
from pipeline.errors import ConfigError
from stages.sparsity.nm_pattern import Pattern

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

ENVIRONMENT_PREFIX = "LAMPCTL_"


@dataclass(frozen=True, kw_only=True)
class Settings(JobSettings, PruningSettings):
    """What a user may set. None means: the default, which may depend on the model and the sparsity."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    @property
    def n_of_m(self) -> Pattern | None:
        """The N:M pattern, if --pattern is given."""
        return Pattern.parse(self.pattern) if self.pattern is not None else None

    @property
    def target_sparsity(self) -> float:
        """The share of the prunable weights that is to be masked."""
        pattern = self.n_of_m
        if pattern is not None:
            return pattern.sparsity
        assert self.sparsity is not None
        return self.sparsity

    @classmethod
    def of(cls, values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Self:
        """Validate values by name; former names are accepted.

        Args:
            values: Values of any origin: strings from the environment, numbers from a file.
            origins: Where each value came from, for messages.

        Raises:
            ConfigError: Values are wrong. The message names each one, its origin and what would be right.
        """
        from pydantic import ValidationError

        try:
            return cls.recorded(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, origins or {})) from error

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """Validate values that lampctl wrote itself. Raises pydantic's ValidationError."""
        found: Self = _adapter(cls).validate_python(with_current_names(values))
        return found

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, which must be valid already."""
        return replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return values


def _adapter(kind: type[Settings]) -> TypeAdapter[Any]:
    """The validator and serializer of this class. Built once, when a command needs it."""
    if kind not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


_ADAPTERS: dict[type[Settings], TypeAdapter[Any]] = {}


@cache
def hints() -> dict[str, Any]:
    """The annotation of each setting, in the order of their declaration."""
    found = get_type_hints(Settings, include_extras=True)
    names = [item.name for kind in (PruningSettings, JobSettings) for item in fields(kind)]
    return {name: found[name] for name in names}


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


def current_name(name: str) -> str:
    """The setting's current name, for a current or a former one."""
    return former_names().get(name, name)


def known_names() -> tuple[str, ...]:
    """What a file or the environment may give: the settings, and the preset."""
    return ("preset", *sorted(options()))


def no_setting(name: str, origin: str | None) -> str:
    """The message about a name that is no setting."""
    where = f" ({origin})" if origin is not None else ""
    return f"{name}{where} is not a setting of a run{suggestion(name, known_names())}"


def suggestion(name: str, known: Sequence[str]) -> str:
    """What may be meant by an unknown name: the nearest one that is known, or any of them."""
    near = difflib.get_close_matches(name, [*known, *former_names()], n=1)
    return f": did you mean {current_name(near[0])}?" if near else f"; known: {', '.join(known)}"


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
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


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line per wrong setting: its flag, the value, its origin and what would be right."""
    lines = []
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        flag = flag_of(field)
        if problem["type"] == "missing":
            lines.append(f"{flag} is missing (lampctl run --help has examples)")
        elif problem["type"] == "unexpected_keyword_argument":
            lines.append(no_setting(field, origins.get(field)))
        else:
            given = problem["input"]
            given = ", ".join(map(str, given)) if isinstance(given, tuple | list) else given
            message = problem["msg"].removeprefix("Value error, ")
            origin = origins.get(field, "flag")
            where = "" if origin == "flag" else f" ({origin})"
            hint = " (a share, not a percentage: 70% is 0.7)" if problem["type"] == "less_than" else ""
            lines.append(f"{flag} {given}{where}: {message[0].lower()}{message[1:]}{hint}")
    return "\n".join(lines)
