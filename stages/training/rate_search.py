"""Search for the learning rate on the model itself: one direction, and the loss at several distances along it.

The first step of Adam has the same length in every direction, so its distance that lowers the held-out loss most tells
how large steps may be. It differs by a factor of twenty between models and sparsities (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Every distance is this many times its neighbour.
_STEP = 2.0
# Nothing is tried beyond these factors of the first distance.
_FARTHEST, _NEAREST = 2.0**10, 2.0**-7
# A loss that is lower by less than this share is not told from rounding.
_LEAST_GAIN = 1e-4
# Trials of a usual search: one at the first distance, one beside it, and one more on each side.
USUAL_TRIALS = 4


@dataclass(frozen=True)
class Trial:
    """A distance along the direction, and the loss there."""

    distance: float
    loss: float  # infinite: none that is finite


def search(loss_at: Callable[[float], float], at_zero: float, first: float) -> float | None:
    """Find the distance along a line at which a loss is lowest: from `first` on by factors of two, then a parabola.

    Args:
        loss_at: The loss at a distance, infinite where there is none. Asked once for each distance.
        at_zero: The loss at distance zero.
        first: Where to begin, above zero.

    Returns:
        The distance; None: the loss is lower nowhere on the line, which then says nothing.
    """
    losses: dict[float, float] = {}

    def at(distance: float) -> float:
        if distance not in losses:
            losses[distance] = loss_at(distance)
        return losses[distance]

    best = first
    factor = _STEP if at(first) < at_zero and at(first * _STEP) < at(first) else 1 / _STEP
    while first * _NEAREST < best < first * _FARTHEST and (
        at(best * factor) < at(best) or (math.isinf(at(best)) and factor < 1)
    ):
        best *= factor
    if not at(best) < at_zero * (1 - _LEAST_GAIN):
        return None
    lower, upper = best / _STEP, best * _STEP
    return _vertex((lower, at(lower)), (best, at(best)), (upper, at(upper)))


def _vertex(lower: tuple[float, float], middle: tuple[float, float], upper: tuple[float, float]) -> float:
    """Where the parabola through three points (distance, loss) is lowest; the middle one if it has no such place."""
    (a, at_a), (b, at_b), (c, at_c) = lower, middle, upper
    if not (at_b <= at_a and at_b <= at_c and math.isfinite(at_a + at_b + at_c)):
        return b
    left, right = (b - a) * (at_b - at_c), (b - c) * (at_b - at_a)
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right) if left != right else b
