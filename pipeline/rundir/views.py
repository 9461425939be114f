"""Views: files and folders of a run directory that are derived from its commits and may be made again at any time."""

from __future__ import annotations

from pathlib import Path

from pipeline.rundir.records import Payload, PayloadFile, relative_path
from pipeline.rundir.storage.base import Storage

_NOT_VIEWS = {"run.json", "commits", "data", "progress", "lease.json", "events.jsonl"}


def publish(storage: Storage, payload: Payload, target: str) -> Path:
    """Show a committed payload as the folder `target` of the run directory, by hard links.

    The folder appears complete or not at all. One that shows this payload already is kept, another one is replaced.
    """
    return storage.publish(_require_view(target, is_folder=True), _sources(payload))


def is_published(storage: Storage, payload: Payload, target: str) -> bool:
    """Whether the folder `target` shows the whole payload."""
    return storage.is_published(_require_view(target, is_folder=True), _sources(payload))


def write_view(storage: Storage, path: str, contents: bytes) -> None:
    """Write or replace a file that no commit records, such as model/README.md."""
    storage.replace(_require_view(path), contents)


def _sources(payload: Payload) -> dict[str, PayloadFile]:
    return {payload.inner(file): file for file in payload.files}


def _require_view(path: str, *, is_folder: bool = False) -> str:
    if is_folder and "/" in path:
        raise ValueError(f"{path} is no name of a folder in the run directory")
    if relative_path(path).split("/")[0] in _NOT_VIEWS or path.startswith("."):
        raise ValueError(f"{path} is no place for a view")
    return path
