"""The names under which settings are given: former ones, unknown ones, and two of the same setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

from pipeline.config.declarations import ENVIRONMENT_PREFIX, former_names, options
from pipeline.errors import ConfigError

# The folder of the cache, which is not a setting.
_OTHER_VARIABLES = {"LAMPCTL_CACHE"}


def written_names(given: Iterable[str], spelled: Callable[[str], str] = str) -> dict[str, str]:
    """The name that the user wrote, by the current name of the setting.

    Args:
        given: Names as written in one place: "hold-aside" in a file, "LAMPCTL_HOLD_ASIDE" in the environment.
        spelled: From a name as written to a name of `Settings`: "hold_aside".

    Raises:
        ConfigError: Two of them are the same setting.
    """
    found: dict[str, str] = {}
    for name in given:
        setting = current_name(spelled(name))
        if setting in found:
            raise ConfigError(f"{found[setting]} and {name} are the same setting: give one of them")
        found[setting] = name
    return found


def given_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The name of the environment variable, by the setting that it gives. Unknown settings are among them.

    Raises:
        ConfigError: Two variables give the same setting.
    """
    given = (name for name, value in environ.items() if name.startswith(ENVIRONMENT_PREFIX) and value)
    return written_names(
        (name for name in given if name not in _OTHER_VARIABLES),
        lambda name: name.removeprefix(ENVIRONMENT_PREFIX).lower(),
    )


def require_known_variables(environ: Mapping[str, str]) -> None:
    """Check the environment of a command that takes settings, whether or not it reads them from there.

    Raises:
        ConfigError: A variable is no setting, with the nearest name; or two give the same setting.
    """
    unknown = {name: setting for setting, name in given_variables(environ).items() if setting not in known_names()}
    if unknown:
        raise ConfigError(*(no_setting(setting, f"environment {name}") for name, setting in unknown.items()))


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
