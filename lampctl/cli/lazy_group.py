"""Commands that are imported when they are called: `lampctl --help` imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command_from_info, get_group_from_info
from typer.models import CommandInfo, TyperInfo

from lampctl.cli.panels import PanelCommand


@dataclass(frozen=True)
class LazyCommand:
    """A command, or a group of commands, by name.

    Attributes:
        reference: ``"module:object"``; the object is a function, or a `typer.Typer` for a group.
        help: First sentence of its help.
        panel: Section of `lampctl --help`.
    """

    reference: str
    help: str
    panel: str = "Commands"

    def load(self, name: str) -> Any:
        """Import the command and build it."""
        module, _, attribute = self.reference.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return get_group_from_info(
                TyperInfo(found, name=name),
                pretty_exceptions_short=False,
                rich_markup_mode=None,
                suggest_commands=True,
            )
        return self.built(name, found)

    @staticmethod
    def built(name: str, callback: Callable[..., None]) -> Any:
        """The command that calls this function."""
        return get_command_from_info(
            CommandInfo(name, cls=PanelCommand, callback=callback), pretty_exceptions_short=False, rich_markup_mode=None
        )


@dataclass(frozen=True)
class StepCommand(LazyCommand):
    """The command of a kind of step: `reference` is a function that gives it by the name of the kind."""

    def load(self, name: str) -> Any:
        module, _, attribute = self.reference.partition(":")
        return self.built(name, getattr(importlib.import_module(module), attribute)(name))


class LazyGroup(TyperGroup):
    """The commands of `lampctl`. Subclasses name them in `lazy`."""

    lazy: ClassVar[Mapping[str, LazyCommand]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(self.lazy)  # typer suggests names from its keys

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """The command of this name; imported at the first call."""
        if self.commands.get(cmd_name) is None and cmd_name in self.lazy:
            self.commands[cmd_name] = self.lazy[cmd_name].load(cmd_name)
        return cast("TyperCommand | TyperGroup | None", self.commands.get(cmd_name))

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        """The option --help. With a default, typer does not import pydantic to convert a missing value."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per panel, from the table alone. ctx, formatter: click's."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.lazy.items():
            panels.setdefault(command.panel, []).append((name, command.help))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
