"""Weights on disk: safetensors, read and written one tensor at a time, whatever the files are called."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.errors import DamagedFileError, ResourceError, UsageError
from stages.formats.safetensors_io import Bytes, head_of, header_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {  # in the order in which the library lays them into a file
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


class WeightFiles:
    """The tensors of one model folder, by their names in the files."""

    def __init__(self, folder: Path) -> None:
        """Raises ResourceError if a file that the index names is missing or is no safetensors file."""
        self._folder = folder
        self._file_of = _index(folder)
        self._described: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by file, then by name

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    @property
    def keys(self) -> Iterable[str]:
        """All names."""
        return self._file_of.keys()

    def dtype(self, key: str) -> torch.dtype:
        """How the tensor is stored. Raises UsageError for a dtype that is no plain number (a quantized model)."""
        name, _ = self._describe(key)
        if name not in _DTYPES:
            raise UsageError(f"{self._folder}: {key} is stored as {name}; load a model that is not quantized")
        return _DTYPES[name]

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._describe(key)[1]

    def _describe(self, key: str) -> tuple[str, tuple[int, ...]]:
        """The name of its dtype in the file, and its shape; each file's header is read once."""
        filename = self._file_of[key]
        if filename not in self._described:
            with _opened(self._folder / filename) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                self._described[filename] = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        return self._described[filename][key]

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A copy of the tensor in memory that torch allocated.

        Not a view of the mapped file: the last bits of a matrix product depend on how its operands are aligned.
        Floating-point tensors are converted to `dtype` if one is given.
        """
        with _opened(self._folder / self._file_of[key]) as file:
            tensor = file.get_tensor(key)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=wanted, copy=True)


class StateFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file by name, each read when it is asked for and kept by nobody.

    names: other names for them, {name: name in the file}; tensors that are not named are left out.
    """

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        """Raises DamagedFileError if it is no safetensors file."""
        self._path = path
        with self._open() as file:
            stored = list(file.keys())
        known = {name: name for name in stored} if names is None else names
        self._stored = {name: key for name, key in known.items() if key in set(stored)}

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._stored[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{self._path} is no safetensors file: {error}") from error


class Joined(Mapping[str, Tensor]):
    """Several mappings of tensors as one. No two may share a name."""

    def __init__(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        self._part_of = {name: part for part in parts for name in part}

    def __getitem__(self, name: str) -> Tensor:
        return self._part_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Bytes]:
    """The bytes of a safetensors file, a tensor at a time: those that the library gives, without a second copy of all.

    tensors: on the CPU. The library writes several entries of `metadata` in no fixed order: give one at most.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    described: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        described[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    yield head_of(header_of(described, metadata))
    for _, tensor in ordered:
        if tensor.nbytes:
            yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds weights that `WeightFiles` can read."""
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def match_names(stored: Iterable[str], wanted: Iterable[str], transforms: Iterable[Any], prefix: str) -> dict[str, str]:
    """For names of a model's state, the names in its files: {wanted: stored}.

    Files may use names of older versions (`transforms`: transformers' own renamings, applied in order) and may
    lack the prefix of the base model, or have it where the model has none.
    """
    targets, found = set(wanted), {}
    renamings = list(transforms)
    for key in stored:
        candidates = [key]
        renamed = key
        for transform in renamings:
            renamed = transform.rename_source_key(renamed)[0]
        candidates.append(renamed)
        for name in (key, renamed):
            candidates += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        for candidate in candidates:
            if candidate in targets and candidate not in found:
                found[candidate] = key
                break
    return found


def _index(folder: Path) -> dict[str, str]:
    if (folder / INDEX).exists():
        try:
            weight_map: Mapping[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ResourceError(f"{folder / INDEX} is damaged: {error}") from error
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise ResourceError(f"{folder} lacks {', '.join(missing)}, which its index names")
        return dict(weight_map)
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    file_of: dict[str, str] = {}
    for path in files:
        with _opened(path) as file:
            file_of.update(dict.fromkeys(file.keys(), path.name))
    return file_of


def _opened(path: Path) -> Any:
    if path.exists() and not os.access(path, os.R_OK):
        raise ResourceError(f"{path} must not be read by this user: change its permissions")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ResourceError(f"{path} cannot be read as safetensors: {error}") from error
