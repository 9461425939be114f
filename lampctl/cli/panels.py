"""Help of a command with many options: in panels, as plain text that pipes and narrow terminals show whole."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand

_ARGUMENTS, _REST = "Arguments", "Options"
# Panels in the order in which a reader needs them.
PANELS = ("Sweep", "What to prune", "Method", "Calibration", "Training", "Evaluation", "Machine", "Stopping", "Storage")


class PanelCommand(TyperCommand):
    """A command whose options stand in panels (typer's ``rich_help_panel``)."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per panel. ctx, formatter: click's context and help formatter."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panels.setdefault(_panel_of(parameter), []).append(record)
        for name in dict.fromkeys((_ARGUMENTS, *PANELS, *panels)):
            if name in panels and name != _REST:
                _write(formatter, name, panels[name])
        if _REST in panels:
            _write(formatter, _REST, panels[_REST])


def _write(formatter: Any, name: str, records: list[tuple[str, str]]) -> None:
    with formatter.section(name):
        formatter.write_dl(records)


def _panel_of(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        return _ARGUMENTS
    panel = getattr(parameter, "rich_help_panel", None)
    return panel if isinstance(panel, str) else _REST
