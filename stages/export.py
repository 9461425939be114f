"""The exported model: pruned blocks as they were committed, everything else as it was.

A pruned block's safetensors already carries the model's own key names and dtypes: it *is* a shard, so only
the weights outside the blocks, the index and the configuration are written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.formats.checkpoint_files import StateFile, serialized
from stages.formats.pruning_masks import PrunedWeight
from stages.formats.safetensors_io import Bytes
from stages.formats.tensor_parts import gather, scatter
from stages.machine.device import DTYPES
from stages.models.base import BlockModel, stored_parts
from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.outcome import LayerOutcome, PruneOutcome, check_layer

_SHARD_BYTES = 256_000_000  # a larger tensor has a file of its own: no more than one is in memory
_METADATA = {"format": "pt"}
# Narrower ones are codes of a quantized tensor, and stay.
_CAST = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def export_dtype(requested: str, original: torch.dtype) -> torch.dtype:
    """The dtype of one exported tensor: its own ("original") or, for floating point, the one asked for."""
    return DTYPES[requested] if requested != "original" and original in _CAST else original


def block_dtypes(model: BlockModel, block_index: int, requested: str) -> dict[str, torch.dtype]:
    """The dtype of each entry of a block's state in the exported model."""
    return {name: export_dtype(requested, d) for name, d in model.original_dtypes(block_index).items()}


def block_shard(model: BlockModel, block_index: int, state: Mapping[str, Tensor]) -> Iterator[Bytes]:
    """A pruned block as one safetensors file, under the names that the model's own files have for them, in pieces.

    Entries that the files lack, which the model computes itself, are left out.
    """
    parts = stored_parts(model, block_index)
    stored = {name: tensor for name, tensor in state.items() if parts[name].key in model.weights}
    return serialized(scatter(parts, stored), _METADATA)


def block_state(model: BlockModel, block_index: int, path: Path) -> Mapping[str, Tensor]:
    """The block's state, names relative to the block, of its file: `block_shard` undone."""
    parts = stored_parts(model, block_index)
    if any(part.shape is not None for part in parts.values()):
        file = StateFile(path)
        return gather({name: part for name, part in parts.items() if part.key in file}, file.__getitem__)
    return StateFile(path, {name: part.key for name, part in parts.items()})


def pruned_weights(model: BlockModel, block_index: int, outcome: PruneOutcome) -> dict[str, PrunedWeight]:
    """Masks and grids of a block as its file of masks holds them, by layer name."""
    parts, infos = stored_parts(model, block_index), {info.name: info for info in model.layers(block_index)}
    layers = outcome.to(torch.device("cpu")).layers
    weights = {}
    for name, layer in layers.items():
        part = parts[f"{infos[name].path}.weight"]
        is_transposed = part.transposed or infos[name].transposed
        place = (part.expert, part.rows, part.cols)
        weights[name] = PrunedWeight(part.key, is_transposed, layer.mask, layer.grid, *place)
    return weights


def outcome_of(weights: Mapping[str, PrunedWeight], pattern: Pattern | None) -> PruneOutcome:
    """What a file of masks says of a block's pruning."""
    return PruneOutcome({name: LayerOutcome(layer.mask, layer.grid) for name, layer in weights.items()}, pattern)


@dataclass(frozen=True)
class BlockCount:
    """What an exported block holds."""

    num_masked: int
    num_other_zeros: int
    num_levels: int  # most distinct values in a row or group; 0: not quantized


def count_block(
    shard: Mapping[str, Tensor], weights: Mapping[str, PrunedWeight], pattern: Pattern | None
) -> BlockCount:
    """Count masked weights, other zeros and levels in a block's file, checking each promise.

    Raises AssertionError where a masked weight is not zero, a group breaks its pattern, a row has too many values.
    """
    num_masked = num_other_zeros = num_levels = 0
    key, stored = "", torch.empty(0)
    for name, layer in sorted(weights.items(), key=lambda item: item[1].key):
        if layer.key != key:  # experts may share a tensor
            key, stored = layer.key, shard[layer.key]
        checked = check_layer(name, layer.matrix_of(stored), LayerOutcome(layer.mask, layer.grid), pattern)
        num_masked += checked.num_masked
        num_other_zeros += checked.num_other_zeros
        num_levels = max(num_levels, checked.num_levels or 0)
    return BlockCount(num_masked, num_other_zeros, num_levels)


def outside_names(model: BlockModel) -> tuple[str, ...]:
    """Every tensor of the model's files that belongs to no block, used or not: all of them are exported unchanged."""
    inside = {key for index in range(model.num_blocks) for key in model.stored_names(index).values()}
    return tuple(key for key in model.weights.keys if key not in inside)


def outside_bytes(model: BlockModel, requested: str) -> int:
    """Size of the tensors outside the blocks as they are exported. Reads none."""
    return sum(_exported_bytes(model, name, requested) for name in outside_names(model))


def _exported_bytes(model: BlockModel, name: str, requested: str) -> int:
    return math.prod(model.weights.shape(name)) * export_dtype(requested, model.weights.dtype(name)).itemsize


@dataclass(frozen=True)
class ExportPlan:
    """The weight files of an exported model: one of each block, then those of the tensors outside the blocks."""

    num_blocks: int
    outside: tuple[tuple[str, ...], ...]  # names by file

    @classmethod
    def of(cls, model: BlockModel, requested: str) -> ExportPlan:
        """The plan of a model. requested: the dtype of the export. Reads no weight."""
        groups: list[list[str]] = []
        size = _SHARD_BYTES
        for name in outside_names(model):
            num_bytes = _exported_bytes(model, name, requested)
            if size + num_bytes > _SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += num_bytes
        return cls(model.num_blocks, tuple(map(tuple, groups)))

    def filename(self, number: int) -> str:
        """Name of a file, as transformers names shards; other tools look for it. number: from 0, blocks first."""
        return f"model-{number + 1:05d}-of-{self.num_blocks + len(self.outside):05d}.safetensors"

    def outside_shards(self, model: BlockModel, requested: str) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """The files of the tensors outside the blocks: name and tensors, one file in memory at a time."""
        for number, names in enumerate(self.outside, self.num_blocks):
            yield self.filename(number), {name: _exported(model, name, requested) for name in names}


def shard_bytes(tensors: Mapping[str, Tensor]) -> Iterator[Bytes]:
    """The bytes of a file of weights, in pieces."""
    return serialized(tensors, _METADATA)


def _exported(model: BlockModel, name: str, requested: str) -> Tensor:
    """A tensor of the model's files as it is exported if no step changes it."""
    tensor = model.weights.load(name)
    return tensor.to(export_dtype(requested, tensor.dtype))


def check_names(model: BlockModel, exported: Iterable[str]) -> None:
    """Raise AssertionError, naming one, if the exported tensors are not those of the model's own files."""
    found, expected = set(exported), set(model.weights.keys)
    # Blocks that an older version finished hold entries that the model computes itself.
    computed = {key for index in range(model.num_blocks) for key in model.stored_names(index).values()}
    lost, added = sorted(expected - found), sorted(found - expected - computed)
    if lost or added:
        raise AssertionError(f"the export lacks {len(lost)} tensors {lost[:3]} and has {len(added)} more {added[:3]}")


def check_unchanged(model: BlockModel, exported: Mapping[str, Tensor], names: Iterable[str], requested: str) -> None:
    """Raise AssertionError if an exported tensor is not the one of the model's own files, but for the dtype requested.

    Args:
        model: The original model.
        exported: Tensors by their names in the files.
        names: Those that no step changed.
        requested: The dtype of the export.
    """
    for name in names:
        expected, found = _exported(model, name, requested), exported[name]
        if found.dtype != expected.dtype or found.shape != expected.shape or _raw(found) != _raw(expected):
            raise AssertionError(f"{name} was not changed by any step, but its exported copy differs")


def check_untrained(model: BlockModel, block: Mapping[str, Tensor], pruned: set[str], requested: str) -> None:
    """Check a block that no step trained: all but the weights of its pruned layers are the original ones.

    Args:
        model: The original model.
        block: The block's exported tensors by their names in the files.
        pruned: Names of the weights of pruned layers.
        requested: The dtype of the export.

    Raises:
        AssertionError: A tensor differs.
    """
    # Blocks are computed in fp32: a double is rounded.
    stored = (name for name in block if name not in pruned and name in model.weights)
    check_unchanged(model, block, (name for name in stored if model.weights.dtype(name) != torch.float64), requested)


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def index_json(files: Mapping[str, Iterable[str]], total_size: int) -> bytes:
    """model.safetensors.index.json: which file holds which key."""
    weight_map = {key: name for name, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
