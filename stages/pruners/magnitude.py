"""Magnitude pruning: the smallest weights of a layer, or of each N:M group, become zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.pruners.base import LayerProblem, PrunedMatrix, Pruner

if TYPE_CHECKING:
    from torch import Tensor

    from stages.sparsity.nm_pattern import Pattern


class Magnitude(Pruner):
    """Prunes by |w|. Needs no data. Changes kept weights only if it quantizes them."""

    name = "magnitude"
    title = "magnitude"
    help = "Zero the smallest weights of each layer. Needs no calibration set."
    needs_data = False

    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer. prepared: not used."""
        return self.keep(layer, magnitude_mask(layer.weight, layer.num_masked, self.options.pattern))


def magnitude_mask(weight: Tensor, num_masked: int, pattern: Pattern | None = None) -> Tensor:
    """True at the `num_masked` weights of smallest magnitude, or N of each group of an N:M pattern.

    weight: (rows, cols), as the result.
    """
    from stages.sparsity.topk import smallest

    return smallest(weight.abs(), num_masked) if pattern is None else pattern.mask(weight.abs())
