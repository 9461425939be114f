"""Merge the settings that a user gave: flag > environment > configuration file > preset. Keeps each value's origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.config.config_file import read_config_file
from pipeline.config.declarations import GivenSettings
from pipeline.config.names import given_variables, written_names
from pipeline.config.settings import Settings
from pipeline.errors import ConfigError

PRESETS: dict[str, GivenSettings] = {
    "quick": {
        "calibration": "pydocs",
        "num_samples": 64,
        "seqlen": 256,
        "effort": "low",
        "evaluate": ("pydocs",),
    },
    "paper": {
        "calibration": "c4",
        "num_samples": 128,
        "seqlen": 2048,
        "bos": "stream",
        "evaluate": ("wikitext2", "ptb", "c4"),
    },
}


@dataclass(frozen=True)
class Gathered:
    """The settings that the user gave.

    Attributes:
        values: The settings; None where nothing was given.
        origins: Where each given value came from: "flag", "environment LAMPCTL_X", "file PATH" or "preset NAME".
        preset: Name of the preset, if any.
    """

    values: Settings
    origins: dict[str, str]
    preset: str | None

    def given(self, field: str) -> bool:
        """Whether the user gave this setting; False for one from a preset or a default."""
        return not self.origins.get(field, "preset").startswith("preset")


def gather(
    flags: GivenSettings,
    config_file: Path | None = None,
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Gathered:
    """Merge flag > environment > file > preset.

    Args:
        flags: Values by name. None: not given.
        config_file: YAML or TOML file.
        preset: Name of a preset. None: the one that the environment or the file names, if any.
        environ: Environment variables.

    Raises:
        ConfigError: Values are wrong. The message names each one, its origin and what would be right.
    """
    from_file = _of_file(config_file) if config_file else {}
    from_environment = {
        setting: _Given(environ[name], f"environment {name}") for setting, name in given_variables(environ).items()
    }
    presets = [layer.pop("preset").value for layer in (from_environment, from_file) if "preset" in layer]
    preset = _known_preset(next((name for name in (preset, *presets) if name is not None), None))
    from_preset = PRESETS[preset] if preset else {}
    from_flags = {name: value for name, value in flags.items() if value is not None}
    layers = (
        {setting: _Given(value, f"preset {preset}") for setting, value in from_preset.items()},
        from_file,
        from_environment,
        {setting: _Given(from_flags[name], "flag") for setting, name in written_names(from_flags).items()},
    )
    given = {setting: found for layer in layers for setting, found in layer.items()}
    origins = {setting: found.origin for setting, found in given.items()}
    return Gathered(Settings.of({setting: found.value for setting, found in given.items()}, origins), origins, preset)


def _known_preset(name: object) -> str | None:
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        raise ConfigError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    return name


class _Given(NamedTuple):
    """A value that the user gave."""

    value: object
    origin: str


def _of_file(path: Path) -> dict[str, _Given]:
    """The settings of a configuration file, which may be written with - or _."""
    content = read_config_file(path)
    try:
        names = written_names(content, lambda name: name.replace("-", "_"))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return {setting: _Given(content[name], f"file {path}") for setting, name in names.items()}
