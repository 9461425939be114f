"""What was pruned and how it was quantized, as a safetensors file beside each pruned block's weights.

For a layer L with R output rows and C input columns: ``L.mask`` holds R x ceil(C / 8) bytes, one bit a weight, the
first column in the highest bit, 1 where it was pruned; ``L.scale`` (R, G) fp32 and ``L.zero`` (R, G) uint8 are its
grid (`stages.quantization.grid`) where there is one. The header says which weight of the model's files L is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from stages.errors import DamagedFileError
from stages.formats.disk_errors import reading
from stages.formats.safetensors_io import TensorFile
from stages.formats.tensor_parts import TensorPart
from stages.formats.tensor_reading import load_tensor
from stages.quantization.grid import Grid

FOLDER = "masks"
_HEADER = "lampctl_masks"
_VERSION = 1


@dataclass(frozen=True)
class PrunedWeight:
    """One pruned layer, as (rows, cols) whatever way the model's files store it."""

    key: str  # name of the weight in the model's files
    transposed: bool  # whether the files hold it as (cols, rows)
    mask: Tensor  # (R, C) bool, True where pruned
    grid: Grid | None
    expert: int | None = None  # the files hold one tensor for all experts of a block: which one this is
    rows: tuple[int, int, int] | None = None  # start, stop, step: the layer's rows, where others lie beside them
    cols: tuple[int, int, int] | None = None  # the same of its columns

    def matrix_of(self, stored: Tensor) -> Tensor:
        """The layer's weights (R, C), as a view of the tensor that the files hold."""
        return TensorPart(self.key, None, self.expert, self.transposed, self.rows, self.cols).of(stored)

    @property
    def is_whole(self) -> bool:
        """Whether the layer's weights are a tensor of their own in the files."""
        return self.expert is None and self.rows is None and self.cols is None


def mask_file(layers: Mapping[str, PrunedWeight]) -> bytes:
    """The file's bytes for one block's layers, by layer name."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    for name, layer in layers.items():
        rows, cols = layer.mask.shape
        tensors[f"{name}.mask"] = pack_bits(layer.mask)
        described[name] = {"key": layer.key, "rows": rows, "cols": cols, "transposed": layer.transposed}
        if not layer.is_whole:
            described[name] |= {"expert": layer.expert, "part": layer.rows}
        if layer.cols is not None:
            described[name]["part_of_cols"] = layer.cols
        if layer.grid is not None:
            tensors[f"{name}.scale"] = layer.grid.scale.cpu().contiguous()
            tensors[f"{name}.zero"] = layer.grid.zero.to("cpu", torch.uint8).contiguous()
            described[name] |= {"bits": layer.grid.bits, "group_size": layer.grid.group_size}
    # One entry: safetensors writes several in no fixed order, and the same masks must be the same bytes.
    return save(tensors, {_HEADER: json.dumps({"version": _VERSION, "layers": described})})


def read_mask_file(path: Path, only: str | None = None) -> dict[str, PrunedWeight]:
    """The layers of one file, or only one of them, by name.

    Raises:
        DamagedFileError: It is no such file.
        StorageUnavailableError: The disk does not answer.
    """
    try:
        return _read(path, only)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise DamagedFileError(f"{path} is no file of masks that this version reads: {error}") from error


def _read(path: Path, only: str | None) -> dict[str, PrunedWeight]:
    layers = {}
    with reading(path), TensorFile(path) as file:
        metadata, entries = file.metadata, file.entries
    for name, about in _described(path, metadata).items():
        if only not in (None, name):
            continue
        grid = None
        if "bits" in about:
            scale, zero = (load_tensor(path, entries[f"{name}.{part}"]) for part in ("scale", "zero"))
            grid = Grid(scale, zero.float(), about["bits"], about["group_size"])
        mask = unpack_bits(load_tensor(path, entries[f"{name}.mask"]), about["cols"])
        rows, cols = (tuple(place) if place else None for place in (about.get("part"), about.get("part_of_cols")))
        layers[name] = PrunedWeight(about["key"], about["transposed"], mask, grid, about.get("expert"), rows, cols)
    return layers


def weight_keys(path: Path) -> dict[str, str]:
    """Which weight of the model's files each layer of one file is, by the layer's name. Raises ValueError.

    Layers that share a tensor with others (experts in one tensor) are left out.
    """
    with reading(path), TensorFile(path) as file:
        described = _described(path, file.metadata)
    return {name: about["key"] for name, about in described.items() if "expert" not in about}


def _described(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    header = json.loads((metadata or {}).get(_HEADER, "{}"))
    if header.get("version") != _VERSION:
        raise ValueError(f"{path.name}: its header is no mask file's of this version")
    layers: dict[str, Any] = header["layers"]
    return layers


def pack_bits(mask: Tensor) -> Tensor:
    """(R, C) bool as (R, ceil(C / 8)) uint8, the first column in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy(), axis=1))


def unpack_bits(packed: Tensor, cols: int) -> Tensor:
    """The (R, cols) bool that `pack_bits` packed."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=cols)).bool()
