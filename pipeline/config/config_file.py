"""Read a configuration file: settings as YAML or TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError


def read_config_file(path: Path) -> dict[str, object]:
    """The settings as written, by name as written. Raises ConfigError."""
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
            _require_single_keys(text, path)
        else:
            raise ConfigError(f"--config {path}: the name must end in .toml, .yaml or .yml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from error  # YAML's take several lines
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected one setting per line, as `name: value`")
    return {str(key): value for key, value in content.items()}


def _require_single_keys(text: str, path: Path) -> None:
    """Raise ConfigError for a key that stands twice in the file or in one of its tables: YAML takes the last one."""
    import yaml

    root = yaml.compose(text, yaml.SafeLoader)
    tables = [root, *(value for _, value in root.value)] if isinstance(root, yaml.MappingNode) else []
    for table in tables:
        if isinstance(table, yaml.MappingNode):
            keys = [key.value for key, _ in table.value if isinstance(key, yaml.ScalarNode)]
            repeated = next((key for key in keys if keys.count(key) > 1), None)
            if repeated is not None:
                raise ConfigError(f"--config {path}: {repeated} is there twice; keep one of them")
