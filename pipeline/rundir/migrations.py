"""From the records of older versions to those of this one, when they are read; the files stay as they are.

A migration is a function from the fields of one schema version to those of the next. It has a name, is never changed
once it was released, and is tested on a run directory that the old version wrote (tests/golden).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]

# kind of record -> schema version -> how its fields become those of the next version. Version 1 is the first.
MIGRATIONS: dict[str, dict[int, Callable[[Fields], Fields]]] = {"RunManifest": {}, "StepCommit": {}}


def migrate(kind: str, fields: Mapping[str, Any], newest: int) -> Fields:
    """The fields as schema version `newest` has them. Raises ValueError for a version that never was."""
    migrated = dict(fields)
    version = migrated.get("schema_version")
    while version != newest:
        step = MIGRATIONS.get(kind, {}).get(version) if type(version) is int else None
        if step is None:
            raise ValueError(f"schema version {str(version)[:20]} never was")
        assert type(version) is int
        version += 1
        migrated = {**step(migrated), "schema_version": version}
    return migrated
