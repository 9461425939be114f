"""The declaration of a setting beside its type: help, panel, scope, and the methods that use it.

Imports neither pydantic nor torch, because every call of lampctl builds its command line from the declarations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.choices import filled

Panel = Literal["What to prune", "Calibration", "Method", "Training", "Evaluation", "Machine", "Stopping", "Storage"]
# Identity settings change the weights: lampctl refuses another value in the same run directory. Runtime settings may
# change at any resume.
Scope = Literal["identity", "runtime"]
# The methods that use a setting: every method, LAMP only, or the methods that read a calibration set.
AppliesTo = Literal["every method", "lamp", "methods with data"]
# How the command line takes the value: as its type says, as a repeated flag, as a list separated by commas, as a path,
# or not at all.
Form = Literal["value", "repeated", "list", "path", "file only"]


@dataclass(frozen=True)
class Option:
    """One setting. The command line, the configuration file's schema and the docs are generated from it."""

    help: str  # a sentence or two; `pipeline.config.choices` fills in the names of registries, as in "{methods}"
    panel: Panel
    metavar: str | None = None
    default: str | None = None  # for people: "128", "by effort"
    scope: Scope = "identity"
    applies_to: AppliesTo = "every method"
    form: Form = "value"
    off: str | None = None  # for a switch: the flag that turns it off; default: --no-<name>
    aliases: tuple[str, ...] = ()  # former names: accepted everywhere, not in the help
    draws_samples: bool = False  # whether it selects the calibration samples

    @property
    def text(self) -> str:
        """The help with the names that can be chosen."""
        return filled(self.help, builtin_only=False)

    @property
    def builtin_text(self) -> str:
        """The help with the names of built-in entries, whatever packages are installed."""
        return filled(self.help, builtin_only=True)

    @property
    def full_help(self) -> str:
        """The text, followed by the default."""
        return f"{self.text} [default: {self.default}]" if self.default is not None else self.text

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        """The JSON Schema of the setting's type, with its help."""
        schema = handler(core_schema)
        return {**schema, "description": self.full_help}


@dataclass(frozen=True)
class Before:
    """Converts the user's text before pydantic checks the type. A ValueError becomes a message about the setting."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Called by pydantic when it builds the validator."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.function, handler(source))


@dataclass(frozen=True)
class After:
    """Checks or converts a value of the right type. A ValueError becomes a message about the setting."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Called by pydantic when it builds the validator."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.function, handler(source))


@dataclass(frozen=True)
class Limits:
    """Bounds of a number, or the shortest length of a text. pydantic checks them and writes them into the JSON Schema.

    annotated_types has the same, but takes 9 ms to import: a tenth of `lampctl run --help`.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Called by pydantic when it builds the validator."""
        return {**handler(source), **{name: bound for name, bound in vars(self).items() if bound is not None}}
