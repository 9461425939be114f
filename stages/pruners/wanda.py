"""Wanda (Sun et al., 2023): magnitude times the norm of the input channel, compared within each output row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.pruners.base import LayerProblem, PrunedMatrix, Pruner, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from stages.sparsity.nm_pattern import Pattern


class Wanda(Pruner):
    """Prunes by |w| |x|. It never changes kept weights, and so cannot quantize them."""

    name = "wanda"
    title = "Wanda"
    help = "Zero the weights of smallest |w| |x| in each output row. Changes no other weight."
    supports_bits = False
    num_weight_copies = 4

    @classmethod
    def statistics(cls) -> type[Statistics]:
        from stages.pruners.statistics import SquareSum

        return SquareSum

    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer by its `SquareSum`."""
        mask = wanda_mask(layer.weight, prepared.mean_square(), layer.num_masked, self.options.pattern)
        return self.keep(layer, mask)


def wanda_mask(weight: Tensor, mean_square: Tensor, num_masked: int, pattern: Pattern | None = None) -> Tensor:
    """True at the pruned weights, `num_masked` in all.

    num_masked // rows weights of every row are pruned, and one more in each of the first rows for the remainder. With
    an N:M pattern, N weights of every group of M columns instead.

    Args:
        weight: (rows, cols).
        mean_square: (cols,), the mean of x^2 per input channel over the calibration tokens.
        num_masked: How many weights are pruned.
        pattern: N:M in place of `num_masked`.
    """
    import torch

    from stages.sparsity.topk import smallest_per_row

    scores = weight.abs() * mean_square.sqrt()
    if pattern is not None:
        return pattern.mask(scores)
    per_row, remainder = divmod(num_masked, weight.shape[0])
    # The first rows lose one more. kthvalue refuses empty tensors, so empty parts are left out.
    parts = [
        smallest_per_row(part, count)
        for part, count in ((scores[:remainder], per_row + 1), (scores[remainder:], per_row))
        if len(part)
    ]
    return torch.cat(parts)
