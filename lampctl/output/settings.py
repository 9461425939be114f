"""Settings as people read them: a table of those that were given, and the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from rich.table import Table

from lampctl.cli.panels import PANELS
from pipeline.config.declarations import flag_of, options, type_of
from pipeline.config.option import Option

_INTRODUCTION = """# Settings

Every setting of a run. It is given by a flag, an environment variable `LAMPCTL_<NAME>`, a line `name: value` in a YAML
or TOML file (`--config FILE`), or a preset; the first of these wins. Identity settings decide the weights: another
value in the same run directory is refused. Runtime settings may change at any resume.

`lampctl config show` prints the values that were given and where they came from, `lampctl config schema` the JSON
Schema of the file. This page is made by `lampctl config reference > docs/settings.md`.
"""


def given_table(values: Mapping[str, Any], origins: Mapping[str, str]) -> Table:
    """Each setting that was given, its value and its origin."""
    table = Table("setting", "value", "from")
    for name in options():
        if name in origins:
            table.add_row(name, _text(values[name]), origins[name])
    return table


def reference() -> str:
    """All settings by panel, as Markdown."""
    parts = [_INTRODUCTION]
    for panel in PANELS:
        rows = [(name, option) for name, option in options().items() if option.panel == panel]
        if rows:
            parts.append(
                f"\n## {panel}\n\n| setting | flag | values | default | scope | |\n|---|---|---|---|---|---|\n"
            )
            parts += [_row(name, option) for name, option in rows]
    return "".join(parts)


def _row(name: str, option: Option) -> str:
    flag = "file only" if option.form == "file only" else f"`{flag_of(name)}`"
    cells = (
        f"`{name}`",
        flag,
        _values(name, option),
        option.default or "-",
        option.scope,
        option.builtin_text,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _values(name: str, option: Option) -> str:
    found = type_of(name)
    if get_origin(found) is Literal:
        return ", ".join(str(value) for value in get_args(found))
    if found is bool:
        return "yes, no"
    if option.form in ("list", "repeated"):
        return "list"
    return {int: "integer", float: "number", str: "text"}.get(found, "table")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
