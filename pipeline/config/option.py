"""What a setting says about itself, beside its type: help, panel, scope, and where it applies.

Imports neither pydantic nor torch: the command line is built from these at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Panel = Literal["What to prune", "Calibration", "Method", "Training", "Evaluation", "Machine", "Stopping", "Storage"]
# Identity settings decide the weights: another value in the same run directory is refused. Runtime settings may change
# at any resume.
Scope = Literal["identity", "runtime"]
# Which methods a setting applies to: every method, LAMP only, or the methods that read a calibration set.
AppliesTo = Literal["every method", "lamp", "methods with data"]
# How a value is written on the command line, where its type does not say it.
Form = Literal["value", "repeated", "list", "path", "file only"]


@dataclass(frozen=True)
class Option:
    """One setting, declared once. The command line, the configuration file's schema and the docs are made from it."""

    help: str  # a sentence or two
    panel: Panel
    metavar: str | None = None
    default: str | None = None  # for people: "128", "by effort"
    scope: Scope = "identity"
    applies_to: AppliesTo = "every method"
    form: Form = "value"
    off: str | None = None  # of a switch: the flag that turns it off; default: --no-<name>
    aliases: tuple[str, ...] = ()  # former names, accepted everywhere and shown nowhere
    draws_samples: bool = False  # it decides which samples the calibration set holds

    @property
    def full_help(self) -> str:
        """The help with the default behind it."""
        return f"{self.help} [default: {self.default}]" if self.default is not None else self.help

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        """The JSON Schema of the setting's type, with its help."""
        schema = handler(core_schema)
        return {**schema, "description": self.full_help}


@dataclass(frozen=True)
class Before:
    """Converts what a user wrote, before the type is checked. A ValueError becomes a message about the setting."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """What pydantic asks for, when a command validates its settings."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.function, handler(source))


@dataclass(frozen=True)
class After:
    """Checks or converts a value of the right type. A ValueError becomes a message about the setting."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """What pydantic asks for, when a command validates its settings."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.function, handler(source))
