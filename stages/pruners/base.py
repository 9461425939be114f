"""What a pruner is: one class that says what it needs, what it supports, what it costs, and how it prunes a layer.

To add one, write a subclass of `Pruner` in one file and name it in `stages.pruners.registry`, or in an entry point of
the group ``lampctl.pruners`` of another package. `stages.testing.pruners.check_pruner` tests it.

R: output rows of a weight.    C: its columns, the input channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

# Names, titles and help are read by commands that need no torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.quantization.grid import Grid
    from stages.sparsity.nm_pattern import Pattern


@dataclass(frozen=True)
class PruneOptions:
    """Options of a run that reach every pruner."""

    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    column_block: int = 128  # columns that share one of SparseGPT's mask decisions
    pattern: Pattern | None = None  # N:M; it then fixes the budget of every layer
    bits: int | None = None  # quantize the weights that are kept
    group_size: int | None = None  # columns that share one quantization grid; None: a whole row
    seed: int = 0


class Statistics(Protocol):
    """Sums over the inputs of a layer, collected on the calibration set."""

    def __init__(self, cols: int, device: torch.device) -> None: ...

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (tokens, C)."""
        ...

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """|(W - W') X|^2 / |W X|^2 of weights (R, C); None: these sums cannot tell."""
        ...

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """What `restored` needs: the sums and the counts."""
        ...

    @classmethod
    def restored(cls, sums: Tensor, counts: Mapping[str, int], device: torch.device) -> Self:
        """The object that had this `state`, to the last bit."""
        ...

    @staticmethod
    def num_numbers(cols: int) -> int:
        """How many fp32 numbers the sums over C input channels hold, for the memory planner."""
        ...


@dataclass(frozen=True)
class LayerProblem:
    """One layer to prune."""

    name: str  # in the whole model: "model.layers.0.self_attn.q_proj"
    weight: Tensor  # (R, C), finite, not to be changed
    num_masked: int  # how many weights become zero; with a pattern, what the pattern says
    grid: Grid | None  # the quantization grid of the weights that are kept; None: they are not quantized


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned layer."""

    weight: Tensor  # (R, C), zero under the mask, on the grid elsewhere, in the dtype of the original
    mask: Tensor  # (R, C) bool, True where pruned
    damping: float | None = None  # the damping that the factorisation needed; None: there was none


class Pruner(ABC):
    """Base of all pruners. Class attributes describe it; an instance holds the options of one run."""

    name: ClassVar[str]  # as `--method` and `--pruner` have it
    title: ClassVar[str]  # in tables and reports
    help: ClassVar[str]  # one line
    needs_data: ClassVar[bool] = True  # whether there is a calibration set
    supports_bits: ClassVar[bool] = True  # whether it can quantize the weights that it keeps
    quantizes_jointly: ClassVar[bool] = False  # whether later columns make up for the error of the grid, too
    serves_lamp: ClassVar[bool] = False  # whether LAMP may prune its blocks with it (`--pruner`)
    num_weight_copies: ClassVar[int] = 3  # copies of a layer's weights that are alive at once

    def __init__(self, options: PruneOptions) -> None:
        self.options = options

    @classmethod
    def statistics(cls) -> type[Statistics] | None:
        """The sums that it needs of each distinct layer input; None: of none."""
        return None

    @classmethod
    def num_matrices(cls, *, is_shared: bool) -> int:
        """Matrices (C, C) that are alive while a layer is solved, beside the statistics, for the memory planner.

        is_shared: several layers read the same input.
        """
        return 0

    def prepare(self, statistics: Statistics, *, is_shared: bool, warn: Callable[[str], None]) -> Any:
        """Work that is done once for all layers with the same input, such as a factorisation.

        Args:
            statistics: An object of the class that `statistics()` names, complete.
            is_shared: Several layers will use the result.
            warn: Receives a message that the user should read.

        Raises:
            NumericalError: The statistics have no usable result.
        """
        return statistics

    @abstractmethod
    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer.

        Args:
            layer: The weight and how much of it goes.
            prepared: What `prepare` returned for the layer's input; None without data.
        """

    def select(self, scores: Tensor, layer: LayerProblem) -> Tensor:
        """The mask (R, C) of the smallest scores: `num_masked` of the layer, or the pattern's of each group."""
        from stages.sparsity.topk import smallest

        pattern = self.options.pattern
        return smallest(scores, layer.num_masked) if pattern is None else pattern.mask(scores)

    def keep(self, layer: LayerProblem, mask: Tensor) -> PrunedMatrix:
        """The layer with its weights as they are, or as the grid has them, and zero under the mask."""
        kept = layer.grid.nearest(layer.weight) if layer.grid is not None else layer.weight
        return PrunedMatrix(kept.masked_fill(mask, 0), mask)
