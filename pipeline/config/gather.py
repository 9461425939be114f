"""Merge the settings that a user gave: flag > environment > configuration file > preset. Keeps each value's origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.settings import ENVIRONMENT_PREFIX, Settings, former_names, variable_of, with_current_names
from pipeline.errors import ConfigError

# LAMPCTL_CACHE is the folder of the cache, not a setting of a run.
_OTHER_VARIABLES = {"LAMPCTL_CACHE"}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "calibration": "pydocs",
        "num_samples": 32,
        "seqlen": 256,
        "effort": "low",
        "evaluate": ("pydocs",),
    },
    "paper": {
        "calibration": "c4",
        "num_samples": 128,
        "seqlen": 2048,
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
    flags: Mapping[str, Any],
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
    from_file = _read_config_file(config_file) if config_file else {}
    from_environment = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _OTHER_VARIABLES and value
    }
    presets = (preset, from_environment.pop("preset", None), from_file.pop("preset", None))
    preset = next((name for name in presets if name is not None), None)
    if preset is not None and preset not in [*PRESETS]:
        raise ConfigError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    layers = (
        (PRESETS[preset] if preset else {}, lambda _: f"preset {preset}"),
        (from_file, lambda _: f"file {config_file}"),
        (from_environment, lambda field: f"environment {variable_of(field)}"),
        ({field: value for field, value in flags.items() if value is not None}, lambda _: "flag"),
    )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in layers:
        named = {former_names().get(field, field): origin(field) for field in layer}
        values |= with_current_names(layer)
        origins |= named
    return Gathered(Settings.of(values, origins), origins, preset)


def _read_config_file(path: Path) -> dict[str, Any]:
    import tomllib

    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    try:
        if path.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix in {".yaml", ".yml"}:
            content = yaml.safe_load(text)
        else:
            raise ConfigError(f"--config {path}: the name must end in .toml, .yaml or .yml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected one setting per line, as `name: value`")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
