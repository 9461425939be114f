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
            parts: Its tensors, by the keys that `parts` gave them.

        Raises:
            ValueError: Their shapes do not go together.
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
    grid = scales[:, None] if scales.ndim == 1 else scales
    for axis, block_size in ((-2, block[0] if block else None), (-1, block[1] if block else None)):
        size, parts = shape[axis], grid.shape[axis]
        if block_size is None or math.ceil(size / block_size) != parts:
            if size % parts:
                raise ValueError(f"{parts} scales for {size} rows or columns")
            block_size = size // parts
        grid = grid.repeat_interleave(block_size, axis).narrow(axis, 0, size)
    return grid


def unpacked(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned numbers of `bits` bits out of words of 32 bits, lowest bits first; axis: along which they are packed."""
    count = 32 // bits
    words = packed.movedim(axis, -1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[:count]
    numbers = (words[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2).movedim(-1, axis)


def require(settings: Settings, what: str, found: object, allowed: tuple[object, ...]) -> None:
    """Raise UsageError for a variant of a format that is not read here."""
    if found not in allowed:
        raise UsageError(
            f"weights quantized by {settings.get('quant_method')} with {what} {found} are not read here (only "
            f"{', '.join(map(str, allowed))}): name the original model"
        )
