"""Weights on disk: safetensors, read and written one tensor at a time, whatever the files are called."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import DamagedFileError, ResourceError, UsageError
from stages.formats.safetensors_io import Bytes, Entry, head_of, header_of
from stages.formats.tensor_reading import DTYPES, entries_of, load_tensor

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

NAMED_BY_CONFIG = (
    "transformers_weights"  # key of config.json with the name of the weight file, if it is not the usual one
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


class WeightFiles:
    """The tensors of one model folder, by their names in the files. Every header is read at the beginning."""

    def __init__(self, folder: Path) -> None:
        """Find the files that transformers would load.

        Raises:
            UsageError: An index names files outside the folder.
            ResourceError: A file or tensor that the index names is missing.
            DamagedFileError: A file is truncated, or no safetensors file, or the index is damaged.
            StorageUnavailableError: The disk does not answer.
        """
        self._folder = folder
        self._place = _places(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    @property
    def keys(self) -> Iterable[str]:
        """All names."""
        return self._place.keys()

    @property
    def filenames(self) -> tuple[str, ...]:
        """The files that hold them, relative to the folder."""
        return tuple(sorted({filename for filename, _ in self._place.values()}))

    def dtype(self, key: str) -> torch.dtype:
        """How the tensor is stored. Raises UsageError for a dtype that torch does not have (a quantized model)."""
        name = self._place[key][1].dtype
        if name not in DTYPES:
            raise UsageError(f"{self._folder}: {key} is stored as {name}; load a model that is not quantized")
        return DTYPES[name]

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._place[key][1].shape

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A copy of the tensor in memory that torch allocated.

        Floating-point tensors are converted to `dtype` if one is given.

        Raises:
            DamagedFileError: The file is truncated.
            StorageUnavailableError: The disk does not answer.
        """
        stored = self.dtype(key)
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        filename, entry = self._place[key]
        # An accelerator converts what it gets: fewer bytes are sent there.
        is_here = device is None or device.type == "cpu"
        return _loaded(self._folder / filename, entry, wanted if is_here else None).to(device=device, dtype=wanted)


class StateFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file by name, each read anew whenever it is asked for.

    names: other names for them, {name: name in the file}; tensors that are not named are left out.
    """

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        """Raises DamagedFileError if it is no safetensors file."""
        self._path = path
        try:
            stored = entries_of(path)
        except (ValueError, OSError) as error:
            raise DamagedFileError(f"{path} is no safetensors file: {error}") from error
        known = {name: name for name in stored} if names is None else names
        self._entries = {name: stored[key] for name, key in known.items() if key in stored}

    def __getitem__(self, name: str) -> Tensor:
        return _loaded(self._path, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


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
    return (folder / INDEX).exists() or bool(_safetensors_of(folder))


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


def weight_filenames(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a folder that transformers loads, and what their index says of them: {tensor: file}.

    Raises:
        UsageError: The index names a file outside the folder.
        ResourceError: A file that the index or config.json names is missing.
        DamagedFileError: The index is damaged.
    """
    named_by_config = _named_by_config(folder)
    if named_by_config is None:
        filenames, named = files_of_weights(folder, SINGLE, INDEX)
    elif named_by_config.endswith(".json"):
        filenames, named = files_of_weights(folder, "", named_by_config)
    else:
        filenames, named = [named_by_config], {}
    return (_safetensors_of(folder) if filenames is None else filenames), named


def _safetensors_of(folder: Path) -> list[str]:
    """Files, and links to files that are missing: folders may have such names, too."""
    return sorted(path.name for path in folder.glob("*.safetensors") if not path.is_dir())


def _places(folder: Path) -> dict[str, tuple[str, Entry]]:
    """For each tensor of a folder its file and its place there."""
    filenames, named = weight_filenames(folder)
    places: dict[str, tuple[str, Entry]] = {}
    for filename in filenames:
        for key, entry in _entries(folder / filename).items():
            # transformers loads all that the shards hold, whether the index names it or not.
            if key not in places or named.get(key) == filename:
                places[key] = (filename, entry)
    absent = next((key for key in named if key not in places), None)
    if absent is not None:
        raise ResourceError(
            f"the index of {folder} says that {named[absent]} holds {absent}, but it does not: the two are not of one "
            "model; copy them again"
        )
    return places


def files_of_weights(folder: Path, single: str, index: str) -> tuple[list[str] | None, dict[str, str]]:
    """The files that transformers loads, and what an index says of them: {tensor: file}.

    A single file comes before an index of shards; a folder that holds both, of different weights, is reported.

    Args:
        folder: Where they are.
        single: What a file of all weights is called.
        index: What an index of shards is called.

    Returns:
        The files' names, None if there is neither; the index, empty if it is not used.

    Raises:
        UsageError: The index names a file outside the folder.
        ResourceError: A file of the index is missing.
        DamagedFileError: The index is damaged.
    """
    if not (folder / single).is_file():
        if not (folder / index).is_file():
            return None, {}
        weight_map = _weight_map(folder / index)
        return sorted(set(weight_map.values())), weight_map
    if (folder / index).is_file() and not _is_index_of(folder / index, single):
        log.warning(
            "%s holds %s and, in %s, the names of other files: transformers loads %s, and so does this; delete the "
            "one that is not meant",
            *(folder, single, index, single),
        )
    return [single], {}


def _named_by_config(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "config.json").read_text()).get(NAMED_BY_CONFIG)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # opening the model reports what is wrong with config.json
    if named is None:
        return None
    if not isinstance(named, str) or _is_outside(named) or not (folder / named).is_file():
        raise ResourceError(f"{folder} lacks {named}, which its config.json names ({NAMED_BY_CONFIG})")
    return named


def _is_index_of(index: Path, single: str) -> bool:
    try:
        return set(_read_index(index).values()) == {single}
    except (DamagedFileError, UsageError):
        return False


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor. Raises ResourceError if a file of the index is missing."""
    weight_map = _read_index(index)
    missing = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if missing:
        raise ResourceError(f"{index.parent} lacks {', '.join(missing)}, which its index names")
    return weight_map


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("its weight_map is not one of file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{index} is damaged: {error}") from error
    outside = next((name for name in weight_map.values() if _is_outside(name)), None)
    if outside is not None:
        raise UsageError(f"{index} names {outside}, which lies outside its folder: a model is read from one folder")
    return weight_map


def _is_outside(name: str) -> bool:
    """Whether a name leads out of the folder that it is relative to."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def _loaded(path: Path, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    try:
        return load_tensor(path, entry, dtype)
    except ValueError as error:
        raise DamagedFileError(str(error)) from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be read any more: {error.strerror}") from error


def _entries(path: Path) -> dict[str, Entry]:
    try:
        return entries_of(path)
    except PermissionError as error:
        raise ResourceError(f"{path} must not be read by this user: change its permissions") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is no safetensors file, or damaged: {error}") from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be read as safetensors: {error}") from error
