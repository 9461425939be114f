"""The values of all settings. Each setting is declared once, in `pruning_settings` or `job_settings`.

Pydantic validates the values when a command runs; `pipeline.config.declarations` needs no values, and no pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.config.declarations import GivenSettings, flag_of, with_current_names
from pipeline.config.job_settings import JobSettings
from pipeline.config.names import no_setting
from pipeline.config.pruning_settings import PruningSettings
from pipeline.errors import ConfigError
from stages.sparsity.nm_pattern import Pattern

if TYPE_CHECKING:
    from pydantic import JsonValue, TypeAdapter, ValidationError


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
    def of(cls, values: GivenSettings, origins: Mapping[str, str] | None = None) -> Self:
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
            raise ConfigError(*_explain(error, origins or {})) from error

    @classmethod
    def recorded(cls, values: GivenSettings) -> Self:
        """Validate values that lampctl wrote itself. Raises pydantic's ValidationError."""
        found: Self = _adapter(cls).validate_python(with_current_names(values))
        return found

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, which must be valid already."""
        return replace(self, **changes)

    def as_json(self) -> dict[str, JsonValue]:
        """All settings, ready for JSON."""
        values: dict[str, JsonValue] = _adapter(type(self)).dump_python(self, mode="json")
        return values


def _adapter(kind: type[Settings]) -> TypeAdapter[Any]:
    """The validator and serializer of this class. Built once, when a command needs it."""
    if kind not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


_ADAPTERS: dict[type[Settings], TypeAdapter[Any]] = {}


def _explain(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
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
    return lines
