"""Files of a model folder that follow from its others: the checkpoint of Meta's form beside a `SamModel`'s weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.formats.base import Write
from stages.formats.checkpoint_files import WeightFiles
from stages.models.base import ModelFolder


class Through(io.RawIOBase):
    """An open file whose bytes go to a function."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, piece: Any, /) -> int:
        """Pass a piece on."""
        self._write(bytes(piece))
        return len(piece)


def derived_files(folder: Path) -> dict[str, Callable[[Write], None]]:
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
