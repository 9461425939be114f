"""Loss of a block's output, and the split into training and held-out samples.

T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

# One sample in 16 is held out: its loss shows whether training generalises.
_HELD_OUT_EVERY = 16
# Lower bound for the target's mean square. Prevents division by a near-zero scale.
_SMALLEST_SCALE = 1e-12


def split_samples(num_samples: int, holds_out: bool) -> tuple[list[int], list[int]]:
    """Indices of the training samples and of the held-out samples.

    With `holds_out`, 1 sample in 16 is held out, at least one; none if there is only one sample.
    """
    if not holds_out or num_samples < 2:
        return list(range(num_samples)), []
    num_held_out = max(1, num_samples // _HELD_OUT_EVERY)
    held_out = [(2 * k + 1) * num_samples // (2 * num_held_out) for k in range(num_held_out)]
    return [i for i in range(num_samples) if i not in set(held_out)], held_out


class BlockLoss(ABC):
    """A loss of a block's output against its target.

    Attributes:
        name: The value of --loss.
        is_relative: Its values are shares of the target's scale, not in the units of activations.
    """

    name: ClassVar[str]
    is_relative: ClassVar[bool]

    @staticmethod
    @abstractmethod
    def of(hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of `hidden` against `target`, both (1, T, H) in fp32; a scalar."""


class SquaredError(BlockLoss):
    """Mean squared error over all elements (LAMP Eq. 9 up to a factor)."""

    name = "mse"
    is_relative = False

    @staticmethod
    def of(hidden: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(hidden, target)


class TokenError(BlockLoss):
    """The error of each token is divided by the mean square of its target: huge activations count as one token."""

    name = "token"
    is_relative = True

    @staticmethod
    def of(hidden: Tensor, target: Tensor) -> Tensor:
        scale = target.square().mean(dim=-1).clamp_min(_SMALLEST_SCALE)
        return ((hidden - target).square().mean(dim=-1) / scale).mean()


LOSSES: dict[str, type[BlockLoss]] = {loss.name: loss for loss in (SquaredError, TokenError)}


def block_loss(hidden: Tensor, target: Tensor, kind: str) -> Tensor:
    """The loss of a block's output against its target.

    Args:
        hidden: The output, (1, T, H).
        target: (1, T, H).
        kind: A name of `LOSSES`.

    Returns:
        A scalar in fp32.
    """
    return LOSSES[kind].of(hidden.float(), target.float())
