"""The flags of the settings, made from the declarations in `pipeline.config`.

Every default is None, so that a command can see which flags the user gave.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from pipeline.config.declarations import GivenSettings, flag_of, options, type_of, variable_of
from pipeline.config.option import Option

if TYPE_CHECKING:
    from pipeline.config.gather import Gathered

ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings as YAML or TOML. Flags win over it.")]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="quick: pydocs, 64 x 256 tokens, low effort, nothing from the hub; paper: as published."
    ),
]
RunDir = Annotated[
    str | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        rich_help_panel="Storage",
        help="Run directory: a folder, or s3://, gs:// or az://BUCKET/PREFIX. "
        "[default: runs/<model>-s<percent>-<method>]",
    ),
]


class Chosen:
    """The settings that the user gave on the command line."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config_file: Path | None = values.pop("config")
        self.preset: str | None = values.pop("preset")
        given = _by_setting(values)
        self.flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def gather(self) -> Gathered:
        """Merge with the environment, the configuration file and the preset. Raises ConfigError."""
        from pipeline.config.gather import gather

        return gather(self.flags, self.config_file, self.preset)


def with_settings(command: Callable[..., None] | None = None, *, without: Collection[str] = ()) -> Callable[..., Any]:
    """Decorate a command whose first parameter is a `Chosen`: add the flags of all settings except `without`."""
    if command is None:
        return functools.partial(with_settings, without=without)
    declared = [parameter for name in options() if name not in without for parameter in parameters_of(name)]
    declared += [_parameter("config", ConfigFile), _parameter("preset", Preset)]
    return _with_parameters(command, declared, Chosen)


def with_changes(
    *names: str,
    environment: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
    default: str | None = "as last used in this run",
) -> Callable[..., Any]:
    """Decorate a command whose first parameter is `GivenSettings`: add the flags of these settings.

    These are the settings that the user gave. A run keeps its value of every other one.

    Args:
        names: Settings.
        environment: Those among them that an environment variable may give, too.
        flags: Another flag for some of them, in front of their own: ``{"eval_seqlen": "--seqlen"}``.
        default: Text of every default; None: as declared.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., Any]:
        declared = [
            parameter
            for name in names
            for parameter in parameters_of(
                name, default, reads_environment=name in environment, flag=(flags or {}).get(name)
            )
        ]
        return _with_parameters(command, declared, _changes)

    return decorate


def with_request(kind: type[Any]) -> Callable[..., Any]:
    """Decorate a command whose second parameter is a `kind`: each of its fields becomes a parameter.

    Decorate it with this first (nearest to the function), then with the settings.

    Args:
        kind: A dataclass whose fields are annotated as typer reads them.
    """
    hints = get_type_hints(kind, include_extras=True)
    declared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., Any]:
        first, _, *own = _typed_parameters(command)

        @functools.wraps(command)
        def wrapper(chosen: Any, **arguments: Any) -> None:
            command(chosen, kind(**{found.name: arguments.pop(found.name) for found in declared}), **arguments)

        keyword_only = [found.replace(kind=inspect.Parameter.KEYWORD_ONLY) for found in own]
        return _with_signature(wrapper, [first, *declared, *keyword_only])

    return decorate


def _with_parameters(
    command: Callable[..., None], declared: Sequence[inspect.Parameter], collect: Callable[[dict[str, Any]], Any]
) -> Callable[..., Any]:
    """The command with more parameters. It receives their values, collected, as its first argument."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        command(collect({found.name: arguments.pop(found.name) for found in declared}), **arguments)

    own = [found.replace(kind=inspect.Parameter.KEYWORD_ONLY) for found in _typed_parameters(command)[1:]]
    return _with_signature(wrapper, [*declared, *own])


def _typed_parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of a function, with annotations that are no text."""
    hints = get_type_hints(command, include_extras=True)
    return [
        found.replace(annotation=hints.get(found.name, found.annotation))
        for found in inspect.signature(command).parameters.values()
    ]


def _with_signature(wrapper: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
    """The same function, which typer and `inspect` see with these parameters."""
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {found.name: found.annotation for found in parameters}
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return wrapper


def _changes(values: dict[str, Any]) -> GivenSettings:
    """The values that were given. Environment variables that are no setting are refused, as `lampctl run` does."""
    from pipeline.config.names import require_known_variables

    require_known_variables(os.environ)
    return _by_setting(values)


def _by_setting(values: Mapping[str, object]) -> dict[str, object]:
    """The values that were given, under the current names of the settings. Raises ConfigError for one given twice."""
    from pipeline.config.names import written_names

    by_flag = {flag_of(name.rstrip("_")): name for name, value in values.items() if value not in (None, [])}
    flags = written_names(by_flag, lambda flag: by_flag[flag].rstrip("_"))
    return {setting: values[by_flag[flag]] for setting, flag in flags.items()}


def parameters_of(
    name: str, default: str | None = None, *, reads_environment: bool = False, flag: str | None = None
) -> Iterator[inspect.Parameter]:
    """Parameters of a command for one setting: its flag, and hidden flags for its former names.

    Args:
        name: The setting.
        default: Text of the default. None: as declared.
        reads_environment: Whether the command line itself reads the environment variable.
        flag: Another flag, in front of the setting's own.
    """
    option = options()[name]
    if default is not None:
        option = replace(option, default=default)
    if option.form == "file only":
        return
    if name == "model":
        argument = typer.Argument(metavar=option.metavar, help=option.text, show_default=False)
        yield _parameter(name, Annotated[str | None, argument])
        return
    envvar = variable_of(name) if reads_environment else None
    names = (flag_of(name),) if flag is None else (flag, flag_of(name))
    yield _parameter(name, Annotated[_type_of(name, option), _flag(name, option, names, envvar=envvar)])
    for alias in option.aliases:
        hidden = _flag(name, option, (flag_of(alias),), is_hidden=True)
        yield _parameter(alias, Annotated[_type_of(name, option), hidden])


def _flag(
    name: str, option: Option, names: Sequence[str], *, is_hidden: bool = False, envvar: str | None = None
) -> Any:
    if type_of(name) is bool:
        names = [f"{flag}/{option.off or f'--no-{flag[2:]}'}" for flag in names]
    return typer.Option(
        *names,
        metavar=option.metavar,
        help=option.full_help,
        rich_help_panel=option.panel,
        hidden=is_hidden,
        envvar=envvar,
        show_envvar=False,
        show_default=False,
    )


def _type_of(name: str, option: Option) -> Any:
    """The type that the command line parses. A list separated by commas stays text; the settings split it."""
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
