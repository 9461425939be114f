"""GPTQ and AWQ: integers of a few bits in 32-bit words, a scale and a zero point for each group of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.models.base import Weights
from stages.models.quantized.base import (
    QuantizedFormat,
    Settings,
    groups_named,
    require,
    require_scales,
    unpacked,
)

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
    deciding = frozenset({"g_idx"})

    def __init__(self, bits: int, group_size: int, zero_offset: int) -> None:
        """zero_offset: what stored zero points lack."""
        self._bits, self._group_size, self._zero_offset = bits, group_size, zero_offset

    @classmethod
    def of(cls, settings: Settings) -> Self:
        require(settings, "bits", settings.get("bits"), (2, 4, 8))
        stored = _stored_format(settings)
        require(settings, "the format", stored, ("gptq", "gptq_v2"))
        require(settings, "settings for single layers", "some" if settings.get("dynamic") else "none", ("none",))
        return cls(settings["bits"], _group_size(settings, "group_size"), 0 if stored == "gptq_v2" else 1)

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        return _parts(weights)

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpacked(parts["qweight"], self._bits, 0)
        # Stored less one, and wrapped round below zero.
        zeros = (unpacked(parts["qzeros"], self._bits, 1) + self._zero_offset) & (2**self._bits - 1)
        scales = _scales(parts, codes, zeros)
        if "g_idx" in parts:
            group_of = groups_named(parts["g_idx"], len(scales), len(codes))
        else:
            group_of = _groups(len(codes), self._group_size, len(scales))
        return (scales[group_of] * (codes - zeros[group_of])).T.contiguous()


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
        return cls(_group_size(settings, "group_size" if "group_size" in settings else "q_group_size"))

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        return _parts(weights)

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, zeros = (_in_order(unpacked(parts[name], 4, 1)) for name in ("qweight", "qzeros"))
        scales = _scales(parts, codes, zeros)
        group_of = _groups(len(codes), self._group_size, len(scales))
        return (scales[group_of] * (codes - zeros[group_of])).T.contiguous()


def _in_order(numbers: Tensor) -> Tensor:
    """Numbers as AWQ packed them, (n, R), in the order of the rows of the weight."""
    words = numbers.unflatten(1, (-1, len(_AWQ_ORDER)))
    found = torch.empty_like(words)
    found[..., list(_AWQ_ORDER)] = words
    return found.flatten(1)


def _stored_format(settings: Settings) -> str:
    """The variant of GPTQ: GPTQModel says `format`, older versions and transformers `checkpoint_format`.

    Raises:
        UsageError: They say different things.
    """
    said = {str(settings[key]).lower() for key in ("format", "checkpoint_format") if settings.get(key)}
    if settings.get("is_marlin_format"):
        said.add("marlin")
    if len(said) > 1:
        raise UsageError(
            f"its quantization_config names several formats ({', '.join(sorted(said))}): leave the right one"
        )
    return said.pop() if said else "gptq"


def _group_size(settings: Settings, key: str) -> int:
    """Inputs of a group; -1: all. Both packages take 128 where a configuration says nothing.

    Raises:
        UsageError: It is no such number.
    """
    value = settings.get(key)
    if value is None:
        return 128
    if type(value) is not int or (value < 1 and value != -1):
        raise UsageError(f"{key} {value!r} in its quantization_config is no size of a group: a positive number, or -1")
    return value


def _scales(parts: Mapping[str, Tensor], codes: Tensor, zeros: Tensor) -> Tensor:
    """Scales, (groups, R). Raises ValueError where they do not go with codes (C, R) and zero points (groups, R)."""
    scales = parts["scales"]
    require_scales(scales)
    if scales.ndim != 2 or scales.shape[1] != codes.shape[1] or scales.shape != zeros.shape:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
        raise ValueError(f"their shapes are {shapes}")
    return scales.float()


def _groups(cols: int, group_size: int, num_groups: int) -> Tensor:
    """The group of each input, (C,).

    Args:
        cols: Inputs.
        group_size: Of a group; -1: one group.
        num_groups: Of which there are scales.

    Raises:
        ValueError: Groups of this size are more, or fewer.
    """
    size = group_size if group_size > 0 else cols
    if math.ceil(cols / size) != num_groups:
        raise ValueError(
            f"group_size {group_size} gives {math.ceil(cols / size)} groups of {cols} inputs, not {num_groups}"
        )
    return torch.arange(cols) // size
