"""A pruned model in one small file: what is in it, and how large each part is.

The file is safetensors. For each file F of the model folder, in this order:

    F::bytes                the file itself, if it is no safetensors file; otherwise
    F::head                 its first bytes, up to the tensors, and then for each tensor T
    F:T                     the tensor as it is, or
    F:T::kept               a layer's kept weights, row after row, or
    F:T::codes              numbers of points on its grid, bit-packed, of all or of the kept weights

and last ``::contents``, JSON that says how each layer is stored and gives the sha256 of each file of the folder.
Masks and grids are those of the folder's own masks/ (`stages.formats.pruning_masks`), which come back with the rest; a
mask that is just the zeros of its weight is not stored. `writer` beside this module writes it, `reader` restores the
folder.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.errors import DamagedFileError, UsageError
from stages.formats import pruning_masks
from stages.formats.base import PackedSizes
from stages.formats.packed.layer import Form
from stages.formats.safetensors_io import TensorFile

FORMAT, VERSION = "lampctl-packed", 1
CONTENTS = "::contents"
AGAIN = "Copy it again from where it came from, or pack the model again"

_SUFFIXES = {("values", True): "::kept", ("values", False): "", ("codes", True): "::codes", ("codes", False): "::codes"}


class PackedFile(BaseModel):
    """One file of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str  # relative, with slashes
    size: int
    sha256: str
    is_derived: bool = (
        False  # follows from the other files (`stages.models.derived_files`), and is not in the packed one
    )


class PackedLayer(BaseModel):
    """How one pruned layer is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: str  # "F:T"
    masks: str  # "F:L" of the folder's masks: L.mask, L.scale and L.zero
    transposed: bool
    holds: Literal["values", "codes"]
    kept_only: bool
    mask: Literal["stored", "zeros", "empty"]
    bits: int | None
    group_size: int | None

    @property
    def form(self) -> Form:
        """What `stages.formats.packed.layer` calls it."""
        return Form(self.holds, self.kept_only, self.mask)

    @property
    def entry(self) -> str:
        """The name of the tensor in the packed file."""
        return self.weight + _SUFFIXES[self.holds, self.kept_only]


class Contents(BaseModel):
    """What ``::contents`` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    files: tuple[PackedFile, ...]
    layers: tuple[PackedLayer, ...]


def open_packed(path: Path) -> TensorFile:
    """The packed file, open. Raises UsageError if it is none, or of a newer version; DamagedFileError."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        file = TensorFile(path)
    except ValueError as error:
        with path.open("rb") as start:
            ours = f'"{FORMAT}"'.encode() in start.read(1 << 12)
        if ours:
            raise DamagedFileError(f"{path} is damaged: {error}. {AGAIN}") from error
        raise UsageError(f"{path} is no packed model: make one with lampctl export RUN --format packed") from error
    version = file.metadata.get("version", "")
    if file.metadata.get("format") == FORMAT and version == str(VERSION):
        return file
    file.close()
    if file.metadata.get("format") == FORMAT:
        raise UsageError(
            f"{path} was packed by a newer lampctl (format {version}, this one knows {VERSION}): update it"
        )
    raise UsageError(f"{path} is no packed model: make one with lampctl export RUN --format packed")


def read_contents(file: TensorFile) -> Contents:
    """What a packed file says of itself. Raises DamagedFileError."""
    try:
        return Contents.model_validate_json(bytes(file.read(CONTENTS)))
    except (ValidationError, KeyError) as error:
        raise DamagedFileError(f"{file.path} is damaged: its list of contents cannot be read. {AGAIN}") from error


def packed_sizes(packed: Path) -> PackedSizes:
    """How large a packed file and its parts are. Raises as `open_packed` and `read_contents` do."""
    with open_packed(packed) as file:
        contents = read_contents(file)
        holds = {layer.entry: layer.holds for layer in contents.layers}
        parts = dict.fromkeys(("masks", "scales", "codes", "values", "untouched", "files", "described"), 0)
        parts["described"] = packed.stat().st_size - sum(entry.size_bytes for entry in file.entries.values())
        for name, entry in file.entries.items():
            parts[_part(name, holds)] += entry.size_bytes
    dense = sum(about.size for about in contents.files if is_weights_file(about.path))
    sizes = {f"{part}_bytes": size for part, size in parts.items()}
    return PackedSizes(dense_bytes=dense, packed_bytes=packed.stat().st_size, **sizes)


def is_mask_file(name: str) -> bool:
    """Whether a file of a model folder, by its relative path, holds masks."""
    return PurePosixPath(name).parent.as_posix() == pruning_masks.FOLDER and name.endswith(".safetensors")


def is_weights_file(name: str) -> bool:
    """Whether a file of a model folder, by its relative path, holds weights."""
    return name.endswith(".safetensors") and not is_mask_file(name)


def _part(name: str, holds: dict[str, Literal["values", "codes"]]) -> str:
    """Which part of the sizes an entry of a packed file counts for."""
    if name.endswith("::bytes"):
        return "files"
    if name == CONTENTS or name.endswith("::head"):
        return "described"
    if name in holds:
        return holds[name]
    if is_mask_file(name.partition(":")[0]):
        return "masks" if name.endswith(".mask") else "scales"
    return "untouched"
