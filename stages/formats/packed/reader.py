"""Unpacks a packed file (`stages.formats.packed.layout`): every file as it was, each checked by its sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from stages.errors import DamagedFileError, StageError, UsageError
from stages.formats.base import DerivedFiles, FormatContext
from stages.formats.packed.layer import FLOATS, decode, implied_mask, raw_bytes
from stages.formats.packed.layout import AGAIN, Contents, PackedFile, PackedLayer, open_packed, read_contents
from stages.formats.pruning_masks import pack_bits, unpack_bits
from stages.formats.safetensors_io import Bytes, Entry, Sink, TensorFile, parse_head
from stages.quantization.grid import Grid


def unpack(packed: Path, target_folder: Path, context: FormatContext) -> None:
    """Make the folder that was packed. One layer is in memory at a time.

    The caller makes the files durable, and removes them after a failure.

    Args:
        packed: The packed file.
        target_folder: The folder, which is missing or empty.
        context: Progress, how files are opened, and the files that follow from others, by the folder as unpacked so
            far.

    Raises:
        UsageError: The folder is not empty; the file is not a packed one, or a newer version wrote it.
        DamagedFileError: What was packed does not come back to the last bit.
    """
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise UsageError(f"{target_folder} is there already and not an empty folder: name a new one")
    with open_packed(packed) as file:
        contents = read_contents(file)
        unpacking = _Unpacking(file, contents)
        # What follows from the other files comes last.
        for number, about in enumerate(sorted(contents.files, key=lambda file: file.is_derived), 1):
            context.callbacks.check_stop()
            path = target_folder / _relative(file.path, about)
            path.parent.mkdir(parents=True, exist_ok=True)
            sha256 = hashlib.sha256()
            with context.create(path) as sink:

                def take(piece: Bytes, sink: Sink = sink, sha256: Any = sha256) -> None:
                    sha256.update(piece)
                    sink.write(piece)

                if about.is_derived:
                    _derive(file.path, about, context.derived, target_folder)(take)
                else:
                    for piece in unpacking.pieces(about):
                        take(piece)
            if sha256.hexdigest() != about.sha256:
                raise DamagedFileError(f"{packed} is damaged: {about.path} in it is not what was packed. {AGAIN}")
            context.callbacks.report(number, len(contents.files), "files")


def _derive(
    packed: Path, about: PackedFile, derived: DerivedFiles, folder: Path
) -> Callable[[Callable[[bytes], object]], None]:
    """What writes a derived file from the files unpacked before. Raises DamagedFileError."""
    try:
        return derived(folder)[about.path]
    except (KeyError, StageError) as error:
        raise DamagedFileError(f"{packed} is damaged: nothing gives {about.path} back. {AGAIN}") from error


class _Unpacking:
    """A packed file, open, from which the folder's files are made."""

    def __init__(self, file: TensorFile, contents: Contents) -> None:
        self._file = file
        self._of_weight = {layer.weight: layer for layer in contents.layers}
        self._of_mask = {f"{layer.masks}.mask": layer for layer in contents.layers}

    def pieces(self, about: PackedFile) -> Iterator[Bytes]:
        """The bytes of one file of the folder. Raises DamagedFileError."""
        try:
            if f"{about.path}::bytes" in self._file.entries:
                yield from self._file.pieces(f"{about.path}::bytes")
                return
            head = bytes(self._file.read(f"{about.path}::head"))
            yield head
            for key, entry in parse_head(head)[1].items():
                yield from self._tensor(f"{about.path}:{key}", entry)
        except (ValueError, KeyError, RuntimeError) as error:
            raise DamagedFileError(f"{self._file.path} is damaged at {about.path}: {error}. {AGAIN}") from error

    def _tensor(self, name: str, entry: Entry) -> Iterator[Bytes]:
        layer = self._of_weight.get(name)
        if layer is not None and not layer.form.is_plain:
            yield raw_bytes(self._weight(layer, entry))
        elif name in self._of_mask and self._of_mask[name].mask != "stored":
            layer = self._of_mask[name]
            path, _, key = layer.weight.partition(":")
            entry = parse_head(bytes(self._file.read(f"{path}::head")))[1][key]
            yield raw_bytes(pack_bits(implied_mask(layer.form, self._weight(layer, entry), layer.transposed)))
        else:
            yield from self._file.pieces(name)

    def _weight(self, layer: PackedLayer, entry: Entry) -> Tensor:
        """A pruned layer's weight as the model's file holds it."""
        if entry.dtype not in FLOATS or len(entry.shape) != 2:
            raise ValueError(f"{layer.weight} is no matrix of weights")
        rows, cols = reversed(entry.shape) if layer.transposed else entry.shape
        mask = grid = None
        if layer.kept_only:
            packed = self._read(f"{layer.masks}.mask", torch.uint8)
            mask = unpack_bits(packed.reshape(rows, (cols + 7) // 8), cols)
        if layer.bits is not None and layer.group_size is not None:
            scale = self._read(f"{layer.masks}.scale", torch.float32).reshape(rows, -1)
            zero = self._read(f"{layer.masks}.zero", torch.uint8).reshape(rows, -1)
            grid = Grid(scale, zero.float(), layer.bits, layer.group_size)
        data = self._file.read(layer.entry)
        return decode(layer.form, data, entry.dtype, entry.shape, layer.transposed, mask, grid)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self._file.read(name), dtype=dtype)


def _relative(packed: Path, about: PackedFile) -> PurePosixPath:
    """Where a file goes, which is inside the folder whatever a forged packed file says."""
    path = PurePosixPath(about.path)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in about.path:
        raise DamagedFileError(f"{packed} is not safe to unpack: it names a file {about.path!r}. {AGAIN}")
    return path
