"""Random pruning: the baseline that every pruner must beat."""

from __future__ import annotations

import zlib
from typing import Any

from stages.pruners.base import LayerProblem, PrunedMatrix, Pruner


class RandomPruner(Pruner):
    """Zeroes random weights: the same ones for the same seed and layer, so that a resumed run gives the same bits."""

    name = "random"
    title = "random"
    help = "Zero random weights. A baseline, no method."
    needs_data = False

    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        import torch  # late: titles and help need no torch

        seed = zlib.crc32(f"{self.options.seed}/{layer.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
        return self.keep(layer, self.select(scores, layer))
