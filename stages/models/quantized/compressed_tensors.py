"""The formats of the package compressed-tensors (llm-compressor): FP8, integers of 8 bits, packed integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from stages.models.base import Weights
from stages.models.quantized.base import QuantizedFormat, Settings, expanded, require, unpacked

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


class CompressedTensors(QuantizedFormat):
    """weight: codes (R, C), or weight_packed, 32-bit words along C; weight_scale: of the matrix, rows or blocks."""

    method = "compressed-tensors"
    dropped = QuantizedFormat.dropped | {
        *("k_scale", "v_scale", "q_scale", "input_zero_point", "output_zero_point", "input_g_idx"),
    }

    def __init__(self, bits: frozenset[int], block: tuple[int, int] | None) -> None:
        """bits: of packed weights, any of these. block: rows and columns of a block; None: all blocks are equal."""
        self._bits, self._block = bits, block

    @classmethod
    def of(cls, settings: Settings) -> Self:
        groups = list((settings.get("config_groups") or {}).values())
        for found in {settings.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}:
            require(settings, "the format", found, _FORMATS)
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        require(settings, "the sparse format", sparsity, ("dense",))
        require(settings, "transforms", "some" if settings.get("transform_config") else "none", ("none",))
        schemes = [scheme for group in groups if (scheme := group.get("weights"))]
        block = next((tuple(s["block_structure"]) for s in schemes if s.get("block_structure")), None)
        return cls(frozenset(scheme["num_bits"] for scheme in schemes), block)

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        stems = [key.removesuffix("weight_scale") for key in weights.keys if key.endswith(".weight_scale")]
        return {f"{stem}weight": {part: stem + part for part in _PARTS if stem + part in weights} for stem in stems}

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale, zero = parts["weight_scale"].float(), parts.get("weight_zero_point")
        if "weight_packed" in parts:
            rows, cols = (int(size) for size in parts["weight_shape"])
            bits = self._bits_of(cols, parts["weight_packed"].shape[-1])
            codes = unpacked(parts["weight_packed"], bits, -1)[..., :cols].float() - 2 ** (bits - 1)
            if zero is not None and zero.dtype == torch.int32:
                zero = unpacked(zero, bits, -2)[..., :rows, :] - 2 ** (bits - 1)
        else:
            codes = parts["weight"].float()
        shape, group_of = tuple(codes.shape), parts.get("weight_g_idx")
        if group_of is not None and bool((group_of >= 0).all()):
            order = group_of.long()
            factors, zeros = scale[..., order], None if zero is None else zero.float()[..., order]
        else:
            factors = expanded(scale, shape, self._block)
            zeros = None if zero is None else expanded(zero.float(), shape, self._block)
        return (codes if zeros is None else codes - zeros) * factors

    def _bits_of(self, cols: int, words: int) -> int:
        """How wide the codes of a packed weight are. Raises ValueError if that cannot be told."""
        fitting = [bits for bits in sorted(self._bits) if math.ceil(cols / (32 // bits)) == words]
        if len(fitting) != 1:
            raise ValueError(f"{words} words for {cols} columns")
        return fitting[0]
