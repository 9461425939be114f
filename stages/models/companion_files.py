"""The files of a model beside its weights, which all go along: tokenizers, templates, preprocessing, code, licences."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import ResourceError
from stages.formats.checkpoint_files import NAMED_BY_CONFIG
from stages.formats.disk_errors import reading
from stages.models.source_card import is_card, kept_name

LARGEST_BYTES = 100_000_000  # a larger file is no tokenizer; weights of an unknown form, data or a film

_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".npz", ".ot", ".tflite", ".mlmodel", ".params", ".nemo", ".engine", ".dduf", ".distcp"),
}
_NEVER_SHARED = {".lock", ".incomplete", ".tmp", ".pyc", ".zip", ".tar", ".gz", ".7z", ".mp4"}


def companions(names: Iterable[str]) -> list[str]:
    """Which of a folder's files are companions of its weights.

    Left out: weights in any form, indexes of shards, hidden files, caches, archives, and folders in which weights lie
    somewhere, which are other models or other forms of this one.

    Args:
        names: All files, relative to the folder, with slashes.
    """
    paths = [PurePosixPath(name) for name in names]
    other_models = {path.parts[0] for path in paths if len(path.parts) > 1 and path.suffix.lower() in _WEIGHTS}
    return sorted(path.as_posix() for path in paths if path.parts[0] not in other_models and _is_companion(path))


def _is_companion(path: PurePosixPath) -> bool:
    is_hidden = any(map(_is_hidden, path.parts))
    is_weights = path.suffix.lower() in _WEIGHTS or path.name.endswith(".index.json")
    return not (is_hidden or is_weights or path.suffix.lower() in _NEVER_SHARED)


@dataclass(frozen=True)
class Companions:
    """The files of a model folder, but its weights."""

    names: tuple[str, ...]  # those that go along, relative to the folder, with slashes
    left_out: tuple[str, ...]  # other files and folders that are not hidden, each with the reason if it is not plain


def companions_of(folder: Path, weights: Collection[str] = ()) -> Companions:
    """The companions of a model folder. Links to files and folders are followed.

    Args:
        folder: The model folder.
        weights: Names of the files that its weights are read from.

    Raises:
        ResourceError: A folder must not be read.
    """
    files, left_out = _walk(folder)
    found = [name for name in companions(files) if _size(folder / name) <= LARGEST_BYTES]
    known = {*found, *weights}
    others = [name for name in files if name not in known and not _is_index(name)]
    left_out += [
        f"{name} (larger than {LARGEST_BYTES // 1_000_000} MB)" if _is_large(folder, name) else name
        for name in _by_folder(others, found)
    ]
    return Companions(tuple(found), tuple(sorted(left_out)))


def companion_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the companions of a model folder, in the order of their names."""
    for name in companions_of(folder).names:
        path = folder / name
        with reading(path):
            yield name, path.read_bytes()


def exported_companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """As `companion_files`, under their names in the exported model, which has a model card of its own."""
    kept = kept_name(path.name for path in folder.iterdir())
    yield from ((kept if is_card(name) else name, contents) for name, contents in companion_files(folder))


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all files that are not hidden; what is no file, and links to a folder that holds them."""
    files: list[str] = []
    others: list[str] = []

    def visit(place: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = place.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            others.append(f"{prefix} (a link to a folder that holds it)")
            return
        for path in sorted(place.iterdir()):
            name = prefix + path.name
            if path.is_dir():
                if not _is_hidden(path.name):
                    visit(path, f"{name}/", above | {here})
            elif path.is_file():
                files.append(name)
            elif not _is_hidden(path.name):
                others.append(f"{name} (no file)")

    try:
        visit(folder, "", frozenset())
    except PermissionError as error:
        raise ResourceError(f"{error.filename} must not be read by this user: change its permissions") from error
    return files, others


def _by_folder(names: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Files of the top folder that are not hidden; of others, the top folder alone where none of its files is kept."""
    with_kept = {PurePosixPath(name).parts[0] for name in kept}
    found: dict[str, int] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if not any(map(_is_hidden, parts)):
            shown = f"{parts[0]}/" if len(parts) > 1 and parts[0] not in with_kept else name
            found[shown] = found.get(shown, 0) + 1
    return list(found)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _is_index(name: str) -> bool:
    return "/" not in name and name.endswith(".index.json")


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _is_large(folder: Path, name: str) -> bool:
    return not name.endswith("/") and _is_companion(PurePosixPath(name)) and _size(folder / name) > LARGEST_BYTES


def exported_config(settings: Mapping[str, Any], requested_dtype: str) -> bytes:
    """The exported model's config.json.

    Args:
        settings: Contents of the source's config.json.
        requested_dtype: "original", or the dtype of the exported weights, which the file and its parts then name.
    """
    exported = {key: value for key, value in settings.items() if key != NAMED_BY_CONFIG}
    if requested_dtype != "original":
        exported = {key: _in_dtype(value, requested_dtype) for key, value in exported.items() if key != "torch_dtype"}
        exported["dtype"] = requested_dtype
    return (json.dumps(exported, indent=2) + "\n").encode()


def _in_dtype(part: Any, dtype: str) -> Any:
    """A value of a configuration; that of a part of the model (a tower) names the dtype, too, if it named one."""
    if not isinstance(part, dict) or not {"dtype", "torch_dtype"} & part.keys() or "model_type" not in part:
        return part
    return {**{key: value for key, value in part.items() if key != "torch_dtype"}, "dtype": dtype}
