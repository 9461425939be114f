"""What a format of quantized weights must say, so that its files can be read a weight at a time.

R, C: output and input features of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.models.base import Weights

Settings = Mapping[str, Any]  # the entry quantization_config of a config.json


class QuantizedFormat(ABC):
    """One way to store quantized weights. An object is that of one model."""

    method: ClassVar[str]  # its quant_method in config.json
    # Parts whose values say how the others are read: small ones, read before any other.
    deciding: ClassVar[frozenset[str]] = frozenset()
    # Last parts of names that only belong to quantized activations: a model with plain weights has none of them.
    dropped: ClassVar[frozenset[str]] = frozenset({"input_scale", "activation_scale", "output_scale"})

    @classmethod
    @abstractmethod
    def of(cls, settings: Settings) -> Self:
        """The format that a configuration describes.

        Raises:
            UsageError: A variant that is not read here, by name.
        """

    @abstractmethod
    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        """For each quantized weight, by the name that it has in a plain model, its tensors in the files.

        Returns:
            {"model.layers.0.mlp.up_proj.weight": {"weight": name in the files, "scale": name in the files}}; keys
            of the inner mappings are the format's own.
        """

    @abstractmethod
    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """A weight as (R, C), in fp32, or (experts, R, C).

        Args:
            parts: Its tensors, by the keys that `parts` gave them. Those that are not `deciding` may be on `meta`: then
                their shapes and dtypes alone are checked.

        Raises:
            ValueError: They do not go together.
        """


def expanded(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Scales of blocks of a matrix, one for each of its entries.

    Args:
        scales: One number; one for each row, (R,) or (R, 1); one for each block, (row blocks, column blocks).
        shape: Of the matrix: (R, C), or (experts, R, C).
        block: Rows and columns of a block, where the last ones may be smaller; None: all blocks are equal.

    Returns:
        A tensor that broadcasts to `shape`.

    Raises:
        ValueError: They are not those of such a matrix.
    """
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    grid = grid_of(scales)
    if grid.shape[:-2] not in ((), shape[:-2]):
        raise ValueError(f"scales of shape {tuple(scales.shape)} for a weight of shape {shape}")
    if tuple(grid.shape[-2:]) == (shape[-2], 1):
        return grid
    for axis, block_size in ((-2, block[0] if block else None), (-1, block[1] if block else None)):
        size, parts = shape[axis], grid.shape[axis]
        if parts == 0 or (size % parts if block_size is None else math.ceil(size / block_size) != parts):
            raise ValueError(f"{parts} scales for {size} rows or columns")
        grid = grid.repeat_interleave(block_size or size // parts, axis).narrow(axis, 0, size)
    return grid


def grid_of(scales: Tensor) -> Tensor:
    """Scales as (..., row blocks, column blocks)."""
    return scales.reshape(1, 1) if scales.numel() == 1 else scales[:, None] if scales.ndim == 1 else scales


def unpacked(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned numbers of `bits` bits out of words of 32 bits, 32 // bits in each, lowest bits first.

    Args:
        packed: Words, (..., W, ...).
        bits: Of a number.
        axis: Along which they are packed.

    Raises:
        ValueError: These are no words.
    """
    words = _words(packed, axis)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)[: 32 // bits]
    numbers = (words[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2).movedim(-1, axis)


def unpacked_densely(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned numbers out of words of 32 bits that follow each other without a gap: some lie in two words.

    Args:
        packed: Words, (..., W, ...), lowest bits first.
        bits: Of a number.
        axis: Along which they are packed.

    Raises:
        ValueError: These are no words.
    """
    words = _words(packed, axis)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits))
    numbers = torch.empty((*words.shape[:-1], 32), dtype=torch.int32, device=packed.device)
    for place in range(32):  # 32 numbers in `bits` words
        word, shift = divmod(place * bits, 32)
        number = (words[..., word].long() & 0xFFFFFFFF) >> shift
        if shift + bits > 32:
            number = number | (words[..., word + 1].long() << (32 - shift))
        numbers[..., place] = number & (2**bits - 1)
    return numbers.flatten(-2).movedim(-1, axis)


def _words(packed: Tensor, axis: int) -> Tensor:
    """Words with the axis along which they are packed last."""
    if packed.dtype != torch.int32 or packed.ndim < 2:
        raise ValueError(f"packed numbers of shape {tuple(packed.shape)} in {packed.dtype}, not words of 32 bits")
    return packed.movedim(axis, -1)


def groups_named(group_of: Tensor, num_groups: int, cols: int) -> Tensor:
    """The group of each input, (C,), as files name it.

    Raises:
        ValueError: They are not numbers of such groups.
    """
    if group_of.is_floating_point() or group_of.is_complex() or group_of.dtype == torch.bool:
        raise ValueError(f"g_idx in {group_of.dtype}")
    if tuple(group_of.shape) != (cols,):
        raise ValueError(f"g_idx of shape {tuple(group_of.shape)} for {cols} inputs")
    lowest, highest = int(group_of.min()), int(group_of.max())
    if lowest < 0 or highest >= num_groups:
        raise ValueError(f"g_idx names the groups {lowest} to {highest}, and there are scales of {num_groups}")
    return group_of.long()


def require_scales(scales: Tensor, *, may_be_exponents: bool = False) -> None:
    """Raise ValueError for scales that are no floating-point numbers, nor exponents where those are allowed."""
    if not scales.is_floating_point() and not (may_be_exponents and scales.dtype == torch.uint8):
        raise ValueError(f"scales in {scales.dtype}")


def require(settings: Settings, what: str, found: object, allowed: tuple[object, ...]) -> None:
    """Raise UsageError for a variant of a format that is not read here."""
    if found not in allowed:
        raise UsageError(
            f"weights quantized by {settings.get('quant_method')} with {what} {found} are not read here (only "
            f"{', '.join(map(str, allowed))}): name the original model"
        )
