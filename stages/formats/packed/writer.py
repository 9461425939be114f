"""Write a pruned model folder as one small file (`stages.formats.packed.layout`), one layer in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from stages.errors import ResourceError, UsageError
from stages.formats import pruning_masks
from stages.formats.base import FormatContext, PackedSizes, Write
from stages.formats.disk_errors import reading
from stages.formats.file_digest import FileDigest, digest_file
from stages.formats.packed.layer import FLOATS, Form, encode
from stages.formats.packed.layout import (
    CONTENTS,
    FORMAT,
    VERSION,
    Contents,
    PackedFile,
    PackedLayer,
    is_mask_file,
    packed_sizes,
)
from stages.formats.pruning_masks import PrunedWeight, pack_bits, read_mask_file
from stages.formats.safetensors_io import Bytes, Entry, TensorFile, TensorWriter


def pack(model_folder: Path, target: Path, context: FormatContext) -> PackedSizes:
    """Write a model folder as one file, from which `stages.formats.packed.reader.unpack` makes the folder again.

    Hidden files (".git") are left out. One layer is in memory at a time. Arguments and errors are those of
    `stages.formats.base.ExportFormat.write`.

    Returns:
        The sizes of the file's parts.
    """
    packing = _Packing(model_folder, context)
    tensors: list[tuple[str, tuple[int, ...]]] = [(f"{name}:", ()) for name in (*packing.files, CONTENTS)]
    for name in packing.files:
        if name.endswith(".safetensors"):
            with _opened(model_folder / name) as file:
                tensors += [(f"{name}:{key}", entry.shape) for key, entry in file.entries.items()]
    with context.create(target) as sink:
        writer = TensorWriter(sink, tensors, {"format": FORMAT, "version": str(VERSION)})
        for number, name in enumerate(packing.files, 1):
            context.callbacks.check_stop()
            packing.add(name, writer)
            context.callbacks.report(number, len(packing.files), "files")
        contents = packing.contents().model_dump_json().encode()
        writer.add(CONTENTS, "U8", [len(contents)], [contents])
        writer.finish()
    return packed_sizes(target)


def folder_files(folder: Path) -> list[str]:
    """The files that make up a model folder, as relative paths: weights first, then masks, then all others."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    return sorted(shown, key=lambda name: (not name.endswith(".safetensors"), is_mask_file(name), name))


def is_packed_from(contents: Contents, folder: Path) -> bool:
    """Whether the folder's files are still those that were packed."""
    if sorted(file.path for file in contents.files) != sorted(folder_files(folder)):
        return False
    return all(
        (folder / file.path).stat().st_size == file.size and digest_file(folder / file.path).sha256 == file.sha256
        for file in contents.files
    )


class _Packing:
    """What is known of a folder while it is packed."""

    def __init__(self, folder: Path, context: FormatContext) -> None:
        self._folder, self._callbacks = folder, context.callbacks
        self.files = folder_files(folder)
        self._masks_of = _masks_of(folder, [name for name in self.files if is_mask_file(name)])
        self._derived = context.derived(folder)
        self._digests: list[PackedFile] = []
        self._layers: dict[str, PackedLayer] = {}  # by "F:L" of its masks

    def contents(self) -> Contents:
        """What is in the packed file, once all files are."""
        missing = self._masks_of.keys() - {layer.weight.partition(":")[2] for layer in self._layers.values()}
        if missing:
            raise UsageError(
                f"{self._folder}/{pruning_masks.FOLDER} has a mask for {min(missing)}, the model no such weight"
            )
        return Contents(files=tuple(self._digests), layers=tuple(self._layers.values()))

    def add(self, name: str, writer: TensorWriter) -> None:
        """Put one file of the folder into the packed one."""
        if not name.endswith(".safetensors"):
            digest = digest_file(self._folder / name)
            if name in self._derived and _derived_digest(self._derived[name]) == digest:
                self._digests.append(PackedFile(path=name, size=digest.size, sha256=digest.sha256, is_derived=True))
                return
            with reading(self._folder / name), (self._folder / name).open("rb") as plain:
                pieces = iter(lambda: plain.read(1 << 22), b"")
                writer.add(f"{name}::bytes", "U8", [digest.size], pieces)
            self._digests.append(PackedFile(path=name, size=digest.size, sha256=digest.sha256))
            return
        with reading(self._folder / name), _opened(self._folder / name) as file:
            sha256, size = hashlib.sha256(file.head), len(file.head)
            writer.add(f"{name}::head", "U8", [size], [file.head])
            for key, entry in file.entries.items():
                raw = file.read(key)
                sha256.update(raw)
                size += len(raw)
                if is_mask_file(name):
                    self._add_mask_tensor(name, key, entry, raw, writer)
                else:
                    self._add_weight(name, key, entry, raw, writer)
        self._digests.append(PackedFile(path=name, size=size, sha256=sha256.hexdigest()))

    def _add_weight(self, name: str, key: str, entry: Entry, raw: bytearray, writer: TensorWriter) -> None:
        if key not in self._masks_of:
            writer.add(f"{name}:{key}", entry.dtype, entry.shape, [raw])
            return
        masks, layer_name = self._masks_of[key]
        layer = read_mask_file(self._folder / masks, only=layer_name)[layer_name]
        form, data = self._encode(key, entry, raw, layer)
        grid = layer.grid
        packed = PackedLayer(
            weight=f"{name}:{key}",
            masks=f"{masks}:{layer_name}",
            transposed=layer.transposed,
            holds=form.holds,
            kept_only=form.kept_only,
            mask=form.mask,
            bits=grid.bits if grid else None,
            group_size=grid.group_size if grid else None,
        )
        self._layers[packed.masks] = packed
        if form.is_plain:
            writer.add(packed.entry, entry.dtype, entry.shape, [data])
        elif form.holds == "values":
            writer.add(packed.entry, entry.dtype, [len(data) // FLOATS[entry.dtype].itemsize], [data])
        else:
            writer.add(packed.entry, "U8", [len(data)], [data])

    def _encode(self, key: str, entry: Entry, raw: bytearray, layer: PrunedWeight) -> tuple[Form, Bytes]:
        if entry.dtype not in FLOATS or len(entry.shape) != 2:
            return Form("values", False, "stored"), raw
        try:
            form, data = encode(raw, entry.dtype, entry.shape, layer)
        except ValueError as error:
            raise UsageError(f"{self._folder}: {error}; its masks are not of this model") from error
        if layer.grid is not None and form.holds == "values":
            self._callbacks.warn(f"{key} is not on its grid to the last bit: its values are stored, not their codes")
        return form, data

    def _add_mask_tensor(self, name: str, key: str, entry: Entry, raw: bytearray, writer: TensorWriter) -> None:
        layer_name, _, part = key.rpartition(".")
        layer = self._layers.get(f"{name}:{layer_name}")
        if part == "mask" and layer is not None and layer.mask != "stored":
            # It comes back from the weight; what that gives has been compared, but for the bits that fill a byte.
            mask = read_mask_file(self._folder / name, only=layer_name)[layer_name].mask
            if pack_bits(mask).numpy().tobytes() != raw:
                raise UsageError(
                    f"{self._folder / name}: {key} has bits beyond its columns; it was not made by lampctl"
                )
            return
        writer.add(f"{name}:{key}", entry.dtype, entry.shape, [raw])


def _derived_digest(write_to: Callable[[Write], None]) -> FileDigest:
    """Size and digest of what a derived file would hold."""
    sha256, size = hashlib.sha256(), 0

    def take(piece: bytes) -> None:
        nonlocal size
        sha256.update(piece)
        size += len(piece)

    write_to(take)
    return FileDigest(size, sha256.hexdigest())


def _masks_of(folder: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """For each pruned weight, the file of its mask and its layer's name there."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder: it has no config.json")
    if not names:
        raise UsageError(
            f"{folder} has no {pruning_masks.FOLDER}/, which a model that lampctl has pruned comes with: prune it "
            "first, in a new run if an older version did"
        )
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        with _opened(folder / name):
            pass  # it is safetensors, then
        try:
            keys = pruning_masks.weight_keys(folder / name)
        except ValueError as error:
            raise UsageError(f"{error}: update lampctl") from error
        found |= {key: (name, layer) for layer, key in keys.items()}
    return found


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except ValueError as error:
        raise ResourceError(f"{path} cannot be read as safetensors: {error}. Export the model again") from error
