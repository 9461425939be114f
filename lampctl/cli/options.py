"""The flags that set up a run, made from the declarations in `pipeline.config`.

Every default is None: only then can a flag that was given be told from one that was not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from pipeline.config.option import Option
from pipeline.config.settings import flag_of, former_names, options, type_of
from stages.pruners.registry import method_names

if TYPE_CHECKING:
    from pipeline.config.gather import Gathered

ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings as YAML or TOML. Flags win over it.")]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="quick: pydocs, 32 x 256 tokens, low effort, nothing from the hub; paper: as published."
    ),
]


class Chosen:
    """What was given on the command line to set up a run."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config_file: Path | None = values.pop("config")
        self.preset: str | None = values.pop("preset")
        given = {name.rstrip("_"): value for name, value in values.items() if value not in (None, [])}
        named = {former_names().get(name, name): value for name, value in given.items()}
        self.flags = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}

    def gather(self) -> Gathered:
        """The settings with those of the environment, the file and the preset. Raises ConfigError."""
        from pipeline.config.gather import gather

        return gather(self.flags, self.config_file, self.preset)


def with_settings(command: Callable[..., None] | None = None, *, without: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command, whose first parameter is a `Chosen`, the flags of all settings but those named."""
    if command is None:
        return functools.partial(with_settings, without=without)
    declared = [parameter for name in options() if name not in without for parameter in parameters_of(name)]
    declared += [_parameter("config", ConfigFile), _parameter("preset", Preset)]
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        command(Chosen({found.name: arguments.pop(found.name) for found in declared}), **arguments)

    hints = get_type_hints(command, include_extras=True)
    parameters = [
        *declared,
        *(found.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[found.name]) for found in own),
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {found.name: found.annotation for found in parameters}
    del wrapper.__wrapped__
    return wrapper


def parameters_of(name: str) -> Iterator[inspect.Parameter]:
    """The command line's parameters for a setting: its flag, and hidden ones for its former names."""
    option = options()[name]
    if option.form == "file only":
        return
    if name == "model":
        argument = typer.Argument(metavar=option.metavar, help=option.help, show_default=False)
        yield _parameter(name, Annotated[str | None, argument])
        return
    yield _parameter(name, Annotated[_type_of(name, option), _flag(name, option, flag_of(name), hidden=False)])
    for alias in option.aliases:
        flag = flag_of(alias)
        yield _parameter(alias, Annotated[_type_of(name, option), _flag(name, option, flag, hidden=True)])


def _flag(name: str, option: Option, flag: str, *, hidden: bool) -> Any:
    is_switch = type_of(name) is bool
    declaration = f"{flag}/{option.off or f'--no-{flag[2:]}'}" if is_switch else flag
    return typer.Option(
        declaration,
        metavar=option.metavar,
        help=option.full_help.format(methods=_listed(method_names()[1:])),
        rich_help_panel=option.panel,
        hidden=hidden,
        show_default=False,
    )


def _type_of(name: str, option: Option) -> Any:
    """What the command line parses: lists between commas stay text, which the settings split."""
    if option.form == "repeated":
        return list[str] | None
    if option.form == "path":
        return Path | None
    found = type_of(name)
    is_text = option.form == "list" or get_origin(found) is not None or found not in (bool, int, float)
    return (str if is_text else found) | None


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    # `compile` is a function of Python.
    name = f"{name}_" if name == "compile" else name
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
