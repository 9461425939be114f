"""The files of a model beside its weights, which all go along: tokenizers, templates, preprocessing, code, licences."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from stages.formats.checkpoint_files import NAMED_BY_CONFIG
from stages.formats.disk_errors import reading
from stages.models.source_card import is_card, kept_name

log = logging.getLogger(__name__)

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
    is_hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    is_weights = path.suffix.lower() in _WEIGHTS or path.name.endswith(".index.json")
    return not (is_hidden or is_weights or path.suffix.lower() in _NEVER_SHARED)


def companion_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the companions of a model folder, in the order of their names."""
    for name in companions(_files(folder)):
        path = folder / name
        if path.stat().st_size > LARGEST_BYTES:
            log.warning("%s is left out: no weights, and larger than %d MB", path, LARGEST_BYTES // 1_000_000)
            continue
        with reading(path):
            yield name, path.read_bytes()


def exported_companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """As `companion_files`, under their names in the exported model, which has a model card of its own."""
    kept = kept_name(path.name for path in folder.iterdir())
    yield from ((kept if is_card(name) else name, contents) for name, contents in companion_files(folder))


def _files(folder: Path) -> Iterator[str]:
    for place, _, filenames in os.walk(folder):
        for filename in filenames:
            path = Path(place, filename)
            if path.is_file():
                yield path.relative_to(folder).as_posix()


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
