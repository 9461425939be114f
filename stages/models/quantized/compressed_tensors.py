"""The formats of the package compressed-tensors (llm-compressor): FP8, integers of 8 bits, packed integers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.models.base import Weights
from stages.models.quantized.base import (
    QuantizedFormat,
    Settings,
    expanded,
    grid_of,
    groups_named,
    require,
    require_scales,
    unpacked,
    unpacked_densely,
)

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
# The first release that packs numbers without gaps (its commit 66e631f6); earlier ones put 32 // bits into each word.
_FIRST_DENSE = (0, 18)

# Rows and columns of the blocks that share a scale; None: all of them.
Block = tuple[int | None, int | None]


class CompressedTensors(QuantizedFormat):
    """weight: codes (R, C), or weight_packed, 32-bit words along C; weight_scale: of the matrix, rows or blocks."""

    method = "compressed-tensors"
    deciding = frozenset({"weight_shape", "weight_g_idx"})
    dropped = QuantizedFormat.dropped | {
        *("k_scale", "v_scale", "q_scale", "input_zero_point", "output_zero_point", "input_g_idx"),
    }

    def __init__(self, bits: Iterable[int], blocks: Iterable[Block], is_dense: bool | None) -> None:
        """An object for one model.

        Args:
            bits: Of packed weights, any of these.
            blocks: That share a scale, any of these.
            is_dense: Whether packed numbers follow each other without gaps; None: not known.
        """
        self._bits, self._blocks, self._is_dense = tuple(sorted(set(bits))), frozenset(blocks), is_dense

    @classmethod
    def of(cls, settings: Settings) -> Self:
        groups = list((settings.get("config_groups") or {}).values())
        for found in {settings.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}:
            require(settings, "the format", found, _FORMATS)
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        require(settings, "the sparse format", sparsity, ("dense",))
        require(settings, "transforms", "some" if settings.get("transform_config") else "none", ("none",))
        schemes = [scheme for group in groups if (scheme := group.get("weights"))]
        for scheme in schemes:
            require(settings, "num_bits", scheme["num_bits"], tuple(range(1, 9)))
        blocks = {block for scheme in schemes for block in _blocks_of(scheme)}
        return cls((scheme["num_bits"] for scheme in schemes), blocks, _is_dense(settings.get("version")))

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        stems = [key.removesuffix("weight_scale") for key in weights.keys if key.endswith(".weight_scale")]
        return {f"{stem}weight": {part: stem + part for part in _PARTS if stem + part in weights} for stem in stems}

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        require_scales(parts["weight_scale"])
        scale, zero = grid_of(parts["weight_scale"].float()), parts.get("weight_zero_point")
        if "weight_packed" in parts:
            codes, zero = self._unpacked(parts["weight_packed"], parts["weight_shape"].tolist(), zero)
        else:
            codes = parts["weight"].float()
        shape, group_of = tuple(codes.shape), parts.get("weight_g_idx")
        if group_of is not None and not bool((group_of == -1).all()):  # -1: inputs are in the order of their groups
            order = groups_named(group_of, scale.shape[-1], shape[-1])
            factors, zeros = scale[..., order], None if zero is None else grid_of(zero.float())[..., order]
        else:
            block = self._block_of(shape, tuple(scale.shape[-2:]))
            factors = expanded(scale, shape, block)
            zeros = None if zero is None else expanded(zero.float(), shape, block)
        return (codes if zeros is None else codes - zeros) * factors

    def _unpacked(self, packed: Tensor, shape: list[int], zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Signed codes and zero points of packed ones. Raises ValueError where they do not fit the shape."""
        if len(shape) < 2 or list(packed.shape[:-1]) != shape[:-1]:
            raise ValueError(f"packed numbers of shape {tuple(packed.shape)} for a weight of shape {tuple(shape)}")
        rows, cols = shape[-2:]
        bits, is_dense = self._packing_of(cols, packed.shape[-1])
        unpack = unpacked_densely if is_dense else unpacked
        codes = unpack(packed, bits, -1)[..., :cols].float() - 2 ** (bits - 1)
        if zero is not None and zero.dtype == torch.int32:
            num_words = _num_words(rows, bits, is_dense=is_dense)
            if zero.ndim < 2 or zero.shape[-2] != num_words:
                raise ValueError(f"zero points of shape {tuple(zero.shape)} for {rows} rows of {bits} bits")
            zero = unpack(zero, bits, -2)[..., :rows, :] - 2 ** (bits - 1)
        return codes, zero

    def _packing_of(self, cols: int, num_words: int) -> tuple[int, bool]:
        """Bits of the codes of a packed row, and whether they follow each other without gaps.

        Raises:
            ValueError: That cannot be told.
        """
        fitting = [
            (bits, is_dense)
            for bits in self._bits
            for is_dense in ((False, True) if 32 % bits else (False,))
            if _num_words(cols, bits, is_dense=is_dense) == num_words
        ]
        if len({bits for bits, _ in fitting}) == 1 and len(fitting) == 2:
            if self._is_dense is None:
                raise ValueError(
                    f"{num_words} words for {cols} columns of {fitting[0][0]} bits: their order depends on the release "
                    "of compressed-tensors, and quantization_config names none as its version"
                )
            return fitting[0][0], self._is_dense
        if len(fitting) != 1:
            raise ValueError(f"{num_words} words for {cols} columns")
        return fitting[0]

    def _block_of(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the blocks that share a scale. Raises ValueError if that cannot be told."""
        if grid == (1, 1):
            return shape[-2], shape[-1]
        sizes = {(rows or shape[-2], cols or shape[-1]) for rows, cols in self._blocks}
        fitting = {
            (min(rows, shape[-2]), min(cols, shape[-1]))
            for rows, cols in sizes
            if grid == (math.ceil(shape[-2] / rows), math.ceil(shape[-1] / cols))
        }
        if len(fitting) != 1:
            raise ValueError(f"{grid[0]} by {grid[1]} scales for a weight of shape {shape}")
        return fitting.pop()


def _num_words(count: int, bits: int, *, is_dense: bool) -> int:
    return math.ceil(count * bits / 32) if is_dense else math.ceil(count / (32 // bits))


def _is_dense(version: Any) -> bool | None:
    """Whether a release packs without gaps; None: not known, as of development versions."""
    release = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version) if isinstance(version, str) else None
    return None if release is None else (int(release[1]), int(release[2])) >= _FIRST_DENSE


def _blocks_of(scheme: Mapping[str, Any]) -> tuple[Block, ...]:
    """Which blocks share a scale, as a scheme of a configuration says.

    Raises:
        UsageError: It says nothing that is known, or what is no size of a block.
    """
    strategy, group_size, structure = (scheme.get(key) for key in ("strategy", "group_size", "block_structure"))
    if structure is not None and strategy in (None, "block"):
        return (_structure(structure),)
    if strategy == "group" or (strategy is None and group_size not in (None, -1)):
        if type(group_size) is not int or group_size < 1:
            raise UsageError(f"group_size {group_size!r} in its quantization_config is no size of a group")
        return ((1, group_size),)
    known: dict[Any, tuple[Block, ...]] = {
        "tensor": ((None, None),),
        "channel": ((1, None),),
        None: ((None, None), (1, None)),
    }
    if strategy not in known:
        raise UsageError(f"weights with one scale for each {strategy!r} are not read here: name the original model")
    return known[strategy]


def _structure(value: Any) -> tuple[int, int]:
    """Rows and columns of a block: [128, 128], or "128x128" as earlier releases wrote it."""
    sizes = value.lower().split("x") if isinstance(value, str) else value
    try:
        rows, cols = (int(size) if isinstance(size, str) else size for size in sizes)
    except (TypeError, ValueError):
        rows = cols = 0
    if type(rows) is not int or type(cols) is not int or min(rows, cols) < 1:
        raise UsageError(f"block_structure {value!r} in its quantization_config is no size of a block")
    return rows, cols
