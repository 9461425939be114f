"""Files of a model folder that follow from its others: the checkpoint of Meta's form beside a `SamModel`'s weights."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.formats.checkpoint_files import WeightFiles
from stages.formats.file_digest import FileDigest
from stages.models.base import ModelFolder

_Write = Callable[[bytes], object]


class Through(io.RawIOBase):
    """An open file whose bytes go to a function."""

    def __init__(self, write: _Write) -> None:
        self._write = write

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, piece: Any, /) -> int:
        """Pass a piece on."""
        self._write(bytes(piece))
        return len(piece)


def derived_files(folder: Path) -> dict[str, Callable[[_Write], None]]:
    """For each such file that a folder of this kind may have, what writes it anew from the folder's weights."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(settings, dict) or settings.get("model_type") != "sam":
        return {}
    from stages.models.sam.encoder import SamEncoder

    model = SamEncoder(ModelFolder(str(folder), folder, "folder", None))
    forms = model.other_forms(_Weights(WeightFiles(folder)))
    return {name: lambda write, form=form: form(Through(write)) for name, form in forms}  # type: ignore[misc]


def derived_digest(write_to: Callable[[_Write], None]) -> FileDigest:
    """What such a file would hold."""
    sha256, size = hashlib.sha256(), 0

    def take(piece: bytes) -> None:
        nonlocal size
        sha256.update(piece)
        size += len(piece)

    write_to(take)
    return FileDigest(size, sha256.hexdigest())


class _Weights(Mapping[str, Tensor]):
    """The tensors of a folder, each read when it is asked for."""

    def __init__(self, files: WeightFiles) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.keys)

    def __len__(self) -> int:
        return len(list(self._files.keys))
