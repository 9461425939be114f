"""ALPS (Meng et al., NeurIPS 2024): choose the mask of a whole layer by operator splitting, then refit kept weights.

SparseGPT fixes the mask of each block of columns before it reaches the next one. ALPS chooses all columns together. A
rising penalty (ADMM) brings two sets of weights together: B, which fits the layer's output, and D, which is sparse.
Their common support is the mask, and conjugate gradients solve for the kept weights.

Unlike in the paper, the penalties are the same for every layer. The inverses then depend on the Hessian alone, and the
layers that read the same input share them: five Cholesky factorizations instead of one eigendecomposition.

R: output rows of a weight.    C: its columns, the input channels.    L: penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import NumericalError
from stages.pruners.base import LayerProblem, PrunedMatrix, Pruner, Statistics
from stages.pruners.sparsegpt import sparsegpt

if TYPE_CHECKING:
    from torch import Tensor

    from stages.pruners.hessian import Factor
    from stages.sparsity.nm_pattern import Pattern

# Relative to the scaled Hessian's diagonal, which is 1. Higher penalties fix the mask before the weights have adapted
# to it; with lower ones B and D do not meet.
_FIRST_PENALTY, _LAST_PENALTY = 0.1, 1.0
_ITERATIONS_PER_PENALTY = 3


class ALPS(Pruner):
    """Chooses the mask of a layer as a whole, and refits the kept weights."""

    name = "alps"
    title = "ALPS"
    help = "Choose each layer's mask as a whole by operator splitting, then refit the kept weights."
    serves_lamp = True
    num_weight_copies = 9

    @classmethod
    def statistics(cls) -> type[Statistics]:
        from stages.pruners.statistics import HessianSum

        return HessianSum

    @classmethod
    def num_matrices(cls, *, is_shared: bool) -> int:
        # The factor, the scaled Hessian, an inverse and its work space; five inverses if layers share them.
        return 1 + (7 if is_shared else 3)

    def prepare(self, statistics: Any, *, is_shared: bool, warn: Callable[[str], None]) -> _Prepared:
        """Factorize and split the Hessian. statistics: a `HessianSum`. Raises NumericalError if there is no factor."""
        from stages.pruners.hessian import factorise

        hessian = statistics.matrix()
        factor = factorise(hessian, self.options.damping, on_retry=warn)
        return _Prepared(hessian, factor, split(hessian, factor, is_shared=is_shared))

    def prune(self, layer: LayerProblem, prepared: Any) -> PrunedMatrix:
        """Prune one layer by its `_Prepared`."""
        factor, pattern = prepared.factor, self.options.pattern
        weight, mask = alps(
            layer.weight, prepared.hessian, factor, layer.num_masked, pattern=pattern, splitting=prepared.splitting
        )
        if layer.grid is not None:
            # SparseGPT's sweep quantizes the weights that ALPS keeps, and compensates each error in later columns.
            weight, mask = sparsegpt(
                layer.weight,
                factor,
                layer.num_masked,
                pattern=pattern,
                grid=layer.grid,
                column_block=self.options.column_block,
                mask=mask,
            )
        return PrunedMatrix(weight, mask, factor.damping)


@dataclass(frozen=True)
class _Prepared:
    """The Hessian, its factor and its splitting. Layers with the same input share one."""

    hessian: Tensor  # (C, C)
    factor: Factor
    splitting: Splitting


@dataclass(frozen=True)
class Splitting:
    """The scaled Hessian and the inverses that ADMM uses. Layers with the same input share one."""

    scaled: Tensor  # S (C, C): the damped Hessian, rows and columns scaled so that its diagonal is 1
    scale: Tensor  # (C,): the square root of the damped Hessian's diagonal
    penalties: tuple[float, ...]  # (L,), rising
    kept: tuple[Tensor, ...]  # L inverses (C, C), if several layers use them; empty: computed when needed

    def inverses(self) -> Iterator[Tensor]:
        """(S + penalty I)^-1 for each penalty. The caller must not change them."""
        yield from self.kept or (_shifted_inverse(self.scaled, penalty) for penalty in self.penalties)


def split(hessian: Tensor, factor: Factor, num_penalties: int = 5, *, is_shared: bool = True) -> Splitting:
    """Split the Hessian, with the damping of its factor, in the Hessian's dtype.

    Args:
        hessian: (C, C), left unchanged.
        factor: Its factor.
        num_penalties: L.
        is_shared: Several layers will use the result: keep its inverses, each as large as the Hessian.
    """
    damped = hessian.clone()
    damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
    damped.diagonal().masked_fill_(factor.dead, 1.0)
    scale = damped.diagonal().sqrt()
    scaled = damped.div_(scale).div_(scale[:, None])
    growth = _LAST_PENALTY / _FIRST_PENALTY
    penalties = tuple(_FIRST_PENALTY * growth ** (i / max(num_penalties - 1, 1)) for i in range(num_penalties))
    kept = tuple(_shifted_inverse(scaled, penalty) for penalty in penalties) if is_shared else ()
    return Splitting(scaled, scale, penalties, kept)


def _shifted_inverse(scaled: Tensor, penalty: float) -> Tensor:
    """(S + penalty I)^-1. It exists, because already the damped Hessian has a Cholesky factor."""
    import torch

    shifted = scaled.clone()
    shifted.diagonal().add_(penalty)
    work = shifted.T  # contiguous columns: LAPACK then works in place
    failed = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if int(failed):
        raise NumericalError(f"the scaled Hessian plus {penalty:g} has no Cholesky factor")
    torch.cholesky_inverse(work, out=work)
    return work


def alps(
    weight: Tensor,
    hessian: Tensor,
    factor: Factor,
    num_masked: int,
    *,
    pattern: Pattern | None = None,
    splitting: Splitting | None = None,
    refit_iterations: int = 5,
) -> tuple[Tensor, Tensor]:
    """Prune a weight to exactly `num_masked` zeros anywhere in the layer, and refit the kept weights.

    SparseGPT's mask is refitted, too, and the better result is returned: the output error on the damped Hessian is
    never above SparseGPT's. There is no quantization grid, because the refit moves all kept weights at once.

    Args:
        weight: (R, C), left unchanged. The computation uses the Hessian's dtype.
        hessian: (C, C), left unchanged.
        factor: The Hessian's factor.
        num_masked: How many weights are pruned; with a pattern, the pattern's count.
        pattern: N:M, in every group of M columns.
        splitting: Of this Hessian, if other layers share it.
        refit_iterations: Iterations of conjugate gradients.

    Returns:
        The new weights (R, C), in the dtype of `weight`, and the mask (R, C), True where pruned.
    """
    if splitting is None:
        splitting = split(hessian, factor)
    dense = weight.detach().to(hessian.dtype)
    greedy, greedy_mask = sparsegpt(dense, factor, num_masked, pattern=pattern)
    target = dense.masked_fill(factor.dead, 0) * splitting.scale
    found, found_mask = _admm(target, splitting, num_masked, pattern)
    results = [
        (_refit(start, target, mask, splitting.scaled, refit_iterations), mask)
        for start, mask in ((greedy * splitting.scale, greedy_mask), (found, found_mask))
    ]
    errors = [_error(kept - target, splitting.scaled) for kept, _ in results]
    kept, mask = results[1] if errors[1] < errors[0] else results[0]
    return (kept / splitting.scale).to(weight.dtype), mask


def _admm(target: Tensor, splitting: Splitting, num_masked: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """Weights (R, C), not yet zero under the mask, and the mask (R, C). target: (R, C), in scaled units."""
    import torch

    pull = target @ splitting.scaled
    fitted, dual = target.clone(), torch.zeros_like(target)  # B and V
    for penalty, inverse in zip(splitting.penalties, splitting.inverses(), strict=True):
        for _ in range(_ITERATIONS_PER_PENALTY):
            sparse = torch.add(fitted, dual, alpha=1 / penalty)  # D
            sparse.masked_fill_(_smallest_squares(sparse, num_masked, pattern), 0)
            fitted = (pull - dual).add_(sparse, alpha=penalty) @ inverse
            dual.add_(fitted - sparse, alpha=penalty)
    return fitted, _smallest_squares(fitted, num_masked, pattern)


def _smallest_squares(weight: Tensor, num_masked: int, pattern: Pattern | None) -> Tensor:
    from stages.sparsity.topk import smallest

    return smallest(weight.square(), num_masked) if pattern is None else pattern.mask(weight.square())


def _refit(start: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, num_iterations: int) -> Tensor:
    """Conjugate gradients on the kept weights, each row a separate system, preconditioned by the diagonal."""
    diagonal = hessian.diagonal()
    weight = start.masked_fill(mask, 0)
    residual = ((target - weight) @ hessian).masked_fill_(mask, 0)
    step = residual / diagonal
    slope = (residual * step).sum(dim=1, keepdim=True)
    for _ in range(num_iterations):
        curved = (step @ hessian).masked_fill_(mask, 0)
        length = _ratio(slope, (step * curved).sum(dim=1, keepdim=True))
        weight.addcmul_(step, length)
        residual.addcmul_(curved, length, value=-1)
        scaled = residual / diagonal
        new_slope = (residual * scaled).sum(dim=1, keepdim=True)
        step.mul_(_ratio(new_slope, slope)).add_(scaled)
        slope = new_slope
    return weight


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, or 0 where the denominator is 0: the row is solved."""
    import torch

    return torch.where(denominator > 0, numerator / denominator, 0)


def _error(lost: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of the change of the weights, E (R, C)."""
    import torch

    return ((lost @ hessian) * lost).sum(dtype=torch.float64).item()
