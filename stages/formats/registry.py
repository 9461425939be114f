"""The export formats by name."""

from __future__ import annotations

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
