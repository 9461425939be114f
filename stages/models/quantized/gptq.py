"""GPTQ and AWQ: integers of a few bits in 32-bit words, a scale and a zero point for each group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from stages.models.base import Weights
from stages.models.quantized.base import QuantizedFormat, Settings, require, unpacked

# Where AWQ puts eight neighbours in a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _parts(weights: Weights) -> dict[str, dict[str, str]]:
    """The tensors of each weight, for both formats."""
    stems = [key.removesuffix("qweight") for key in weights.keys if key.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {f"{stem}weight": {part: stem + part for part in parts if stem + part in weights} for stem in stems}


class Gptq(QuantizedFormat):
    """qweight: (C / numbers of a word, R); qzeros: (groups, R / those); scales: (groups, R); g_idx: (C,)."""

    method = "gptq"

    def __init__(self, bits: int, group_size: int, zero_offset: int) -> None:
        """zero_offset: what stored zero points lack."""
        self._bits, self._group_size, self._zero_offset = bits, group_size, zero_offset

    @classmethod
    def of(cls, settings: Settings) -> Self:
        require(settings, "bits", settings.get("bits"), (2, 4, 8))
        stored = settings.get("checkpoint_format") or "gptq"
        require(settings, "the format", stored, ("gptq", "gptq_v2"))
        require(settings, "settings for single layers", "some" if settings.get("dynamic") else "none", ("none",))
        return cls(settings["bits"], _group_size(settings.get("group_size")), 0 if stored == "gptq_v2" else 1)

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        return _parts(weights)

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpacked(parts["qweight"], self._bits, 0)
        # Stored less one, and wrapped round below zero.
        zeros = (unpacked(parts["qzeros"], self._bits, 1) + self._zero_offset) & (2**self._bits - 1)
        group_of = parts["g_idx"].long() if "g_idx" in parts else _groups(len(codes), self._group_size)
        return (parts["scales"].float()[group_of] * (codes - zeros[group_of])).T.contiguous()


class Awq(QuantizedFormat):
    """qweight: (C, R / 8); qzeros: (groups, R / 8); scales: (groups, R)."""

    method = "awq"

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    @classmethod
    def of(cls, settings: Settings) -> Self:
        require(settings, "bits", settings.get("bits", settings.get("w_bit")), (4,))
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        require(settings, "the version", version, ("gemm",))
        require(settings, "zero_point", settings.get("zero_point", True), (True,))
        return cls(_group_size(settings.get("group_size", settings.get("q_group_size"))))

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        return _parts(weights)

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, zeros = (_in_order(unpacked(parts[name], 4, 1)) for name in ("qweight", "qzeros"))
        group_of = _groups(len(codes), self._group_size)
        return (parts["scales"].float()[group_of] * (codes - zeros[group_of])).T.contiguous()


def _in_order(numbers: Tensor) -> Tensor:
    """Numbers as AWQ packed them, (n, R), in the order of the rows of the weight."""
    words = numbers.unflatten(1, (-1, len(_AWQ_ORDER)))
    found = torch.empty_like(words)
    found[..., list(_AWQ_ORDER)] = words
    return found.flatten(1)


def _group_size(value: Any) -> int:
    return value if isinstance(value, int) else 128


def _groups(cols: int, group_size: int) -> Tensor:
    """The group of each input, (C,). group_size: -1: one group."""
    return torch.arange(cols) // (group_size if group_size > 0 else cols)
