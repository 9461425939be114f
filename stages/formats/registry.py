"""The export formats by name."""

from __future__ import annotations

from pathlib import Path

from stages.errors import UsageError
from stages.formats.base import ExportFormat
from stages.registry import Registry

EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry(
    "export format",
    {
        "folder": "stages.formats.folder:FolderFormat",
        "packed": "stages.formats.packed.format:PackedFormat",
    },
    group="lampctl.export_formats",
    base="stages.formats.base:ExportFormat",
)


def format_help() -> str:
    """Each format with its help line, for `--help`. A format whose package cannot be imported has only its name."""
    lines = []
    for name in EXPORT_FORMATS.names:
        try:
            lines.append(f"{name}: {EXPORT_FORMATS.get(name).help}")
        except UsageError:
            lines.append(f"{name}.")
    return " ".join(lines)


def file_formats() -> tuple[str, ...]:
    """The formats that are one file."""
    return tuple(entry.name for entry in EXPORT_FORMATS.entries() if entry.suffix is not None)


def restoring_formats() -> tuple[type[ExportFormat], ...]:
    """The formats whose files give the model folder back."""
    return tuple(entry for entry in EXPORT_FORMATS.entries() if entry.can_restore)


def format_of(file: Path) -> type[ExportFormat]:
    """The format that restores this file. Raises UsageError if none does; DamagedFileError."""
    reasons = []
    for entry in restoring_formats():
        try:
            entry.require_restorable(file)
        except UsageError as error:
            reasons.append(str(error))
        else:
            return entry
    raise UsageError("; ".join(dict.fromkeys(reasons)))
