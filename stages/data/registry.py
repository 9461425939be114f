"""The data sources by name, and how a user's ``KIND`` or ``KIND:PATH`` is parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.errors import UsageError
from stages.registry import Registry

# Help lists the names; importing the classes takes 30 ms.
if TYPE_CHECKING:
    from stages.data.base import DataSource

DATA_SOURCES: Registry[type[DataSource]] = Registry(
    "data source",
    {
        "c4": "stages.data.c4:C4",
        "wikitext2": "stages.data.wikitext2:WikiText2",
        "ptb": "stages.data.ptb:PennTreebank",
        "pydocs": "stages.data.pydocs:PythonDocs",
        "text": "stages.data.text_file:TextFile",
        "jsonl": "stages.data.jsonl_file:JsonLinesFile",
        "parquet": "stages.data.parquet_file:ParquetFile",
        "hf": "stages.data.hub_dataset:HubDataset",
        "sa1b": "stages.data.sa1b:SA1B",
        "coco": "stages.data.coco:COCO",
        "images": "stages.data.image_folder:ImageFolder",
    },
    base="stages.data.base:DataSource",
)


def parse_source(name: str) -> DataSource:
    """The data source that a user named.

    Raises:
        UsageError: There is no such kind of data source, or nothing is at its path.
    """
    kind, colon, path = name.partition(":")
    if kind in DATA_SOURCES:
        entry = DATA_SOURCES.get(kind)
        if entry.path != ("none" if colon else "required"):
            return entry.named(path if colon else None)
    hint = "" if colon else _hint_for_file(name)
    raise UsageError(f"{name!r} is not a data source: choose one of {', '.join(source_forms())}{hint}")


def _hint_for_file(name: str) -> str:
    """How the data source of a local file or folder is written; empty if there is no such file."""
    from stages.data.text_file import kind_by_ending
    from stages.formats.file_digest import local_path

    path = local_path(name)
    if path.is_dir():
        return f"; for a folder of pictures, images:{name}"
    return f"; for a file, {kind_by_ending(path)}:{name}" if path.is_file() else ""


def source_kind(name: str) -> type[DataSource] | None:
    """The kind of data source that a name begins with, whether or not its path exists; None for an unknown kind."""
    kind = name.partition(":")[0]
    return DATA_SOURCES.get(kind) if kind in DATA_SOURCES else None


def source_forms(contents: str | None = None) -> tuple[str, ...]:
    """How data sources are written: ("c4", "c4:PATH", ...). contents: only those that hold this."""
    entries = (entry for entry in DATA_SOURCES.entries() if contents in (None, entry.contents))
    return tuple(form for entry in entries for form in entry.forms())
