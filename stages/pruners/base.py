"""Interface of pruners: one class states what a pruner needs, supports and costs, and prunes a layer.

To add a pruner, write a subclass of `Pruner` in one file. Name it in `stages.pruners.registry`, or, in another package,
in an entry point of the group ``lampctl.pruners``. Test it with `stages.testing.pruners.check_pruner`.

R: output rows of a weight.    C: its columns, the input channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from stages.errors import UsageError

# Commands that need no torch read names, titles and help.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.quantization.grid import Grid
    from stages.sparsity.nm_pattern import Pattern


@dataclass(frozen=True)
class PruneOptions:
    """Options of a run that every pruner receives."""

    damping: float = 0.01  # added to the Hessian's diagonal, as a share of the diagonal's mean
    column_block: int = 128  # SparseGPT chooses the mask of this many columns at once
    pattern: Pattern | None = None  # N:M, which fixes the budget of every layer
    bits: int | None = None  # quantize the kept weights to this many bits; None: do not quantize
    group_size: int | None = None  # columns that share one quantization grid; None: a whole row
    seed: int = 0
    calibrates_all_experts: bool = False  # statistics of experts on all tokens, not on those that the router sends


class Statistics(Protocol):
    """Sums over the inputs of a layer, collected on the calibration set."""

    def __init__(self, cols: int, device: torch.device) -> None: ...

    def add(self, x: Tensor) -> None:
        """Add the inputs `x`, (tokens, C)."""
        ...

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """|(W - W') X|^2 / |W X|^2 of weights (R, C); None: these sums do not determine it."""
        ...

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """The sums and the counts, for a checkpoint."""
        ...

    @classmethod
    def restored(cls, sums: Tensor, counts: Mapping[str, int], device: torch.device) -> Self:
        """Recreate the statistics from `state`, bit for bit."""
        ...

    @staticmethod
    def num_numbers(cols: int) -> int:
        """How many fp32 numbers the sums of `cols` input channels hold, for the memory planner."""
        ...


@runtime_checkable
class PooledStatistics(Statistics, Protocol):
    """Statistics that experts of a mixture can share: an expert that received few tokens gets mean ones of all."""

    @classmethod
    def total(cls, parts: Sequence[Any]) -> Self:
        """The statistics of the tokens of all `parts` together, which stay as they are.

        The total of a total and of further parts is bit-identical to the total of all these parts: passes over the
        samples may collect them in groups.
        """
        ...

    def complete(self, total: Any, num_tokens: int) -> None:
        """Add mean tokens of `total` until there are `num_tokens`."""
        ...


@dataclass(frozen=True)
class LayerProblem:
    """One layer to prune."""

    name: str  # in the whole model: "model.layers.0.self_attn.q_proj"
    weight: Tensor  # (R, C), finite; must not be changed
    num_masked: int  # how many weights are pruned; with an N:M pattern, the pattern's count
    grid: Grid | None  # the quantization grid of the kept weights; None: they are not quantized


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned layer."""

    weight: Tensor  # (R, C), zero under the mask, on the grid elsewhere, in the dtype of the original
    mask: Tensor  # (R, C) bool, True where pruned
    damping: float | None = None  # the damping of the factorization; None: no factorization


class Pruner(ABC):
    """Base class of pruners. Class attributes describe the pruner; an instance holds the options of one run.

    Raises:
        UsageError: The options ask for something that the pruner does not support.
    """

    name: ClassVar[str]  # the value of `--method` and `--pruner`
    title: ClassVar[str]  # in tables and reports
    help: ClassVar[str]  # one line
    needs_data: ClassVar[bool] = True  # it needs a calibration set
    supports_bits: ClassVar[bool] = True  # it can quantize the kept weights
    supports_pattern: ClassVar[bool] = True  # it can prune to an N:M pattern
    quantizes_jointly: ClassVar[bool] = False  # its updates of later columns compensate the quantization error, too
    serves_lamp: ClassVar[bool] = False  # LAMP may use it (`--pruner`)
    num_weight_copies: ClassVar[int] = 3  # copies of a layer's weights in memory at once, for the memory planner

    def __init__(self, options: PruneOptions) -> None:
        if options.bits is not None and not self.supports_bits:
            raise UsageError(f"the pruner {self.name} cannot quantize (bits={options.bits}): choose another one")
        if options.pattern is not None and not self.supports_pattern:
            raise UsageError(f"the pruner {self.name} cannot prune to {options.pattern}: choose another one")
        self.options = options

    @classmethod
    def statistics(cls) -> type[Statistics] | None:
        """The class of statistics that it needs of each distinct layer input; None: it needs none."""
        return None

    @classmethod
    def num_matrices(cls, *, is_shared: bool) -> int:
        """Matrices (C, C) in memory at once while a layer is solved, without the statistics, for the memory planner.

        is_shared: several layers read the same input.
        """
        return 0

    def prepare(self, statistics: Statistics, *, is_shared: bool, warn: Callable[[str], None]) -> Any:
        """Compute once what all layers with the same input need, such as a factorization.

        Args:
            statistics: Complete statistics, of the class that `statistics()` returns.
            is_shared: Several layers will use the result.
            warn: Shows a message to the user.

        Raises:
            NumericalError: The statistics have no usable result.
        """
        return statistics

    @abstractmethod
    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer.

        Args:
            layer: The weight and how many of its entries are pruned.
            prepared: The result of `prepare` for the layer's input; None without statistics.
        """

    def select(self, scores: Tensor, layer: LayerProblem) -> Tensor:
        """The mask (R, C) of the smallest scores: `num_masked` of the layer, or N of each group of an N:M pattern."""
        from stages.sparsity.topk import smallest

        pattern = self.options.pattern
        return smallest(scores, layer.num_masked) if pattern is None else pattern.mask(scores)

    def keep(self, layer: LayerProblem, mask: Tensor) -> PrunedMatrix:
        """Zero the weights under the mask; keep the others, rounded to the quantization grid if there is one."""
        kept = layer.grid.nearest(layer.weight) if layer.grid is not None else layer.weight
        return PrunedMatrix(kept.masked_fill(mask, 0), mask)
