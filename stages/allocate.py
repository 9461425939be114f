"""Measure each block's share of outlying weights, for a data-dependent budget (OWL, Yin et al., 2024).

A weight is outlying if |w| |x| is more than 5 times the mean of its layer; |x| is the norm of its input channel over
the calibration set. One pass of the original model measures the shares; `stages.sparsity.owl` computes the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.interfaces import Samples, Scratch
from stages.models.base import BlockModel, LayerInfo
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import Counter
from stages.sparsity.budget import BlockBudget, LayerShape
from stages.sparsity.owl import budget_by_outliers

_OUTLYING = 5.0  # times the layer's mean of |w| |x|


@dataclass(frozen=True)
class OutlierSettings:
    """What a budget by outliers depends on beside the data (`stages.sparsity.owl.budget_by_outliers`)."""

    blocks: Sequence[Sequence[LayerShape]]  # the prunable layers of each block
    spread: float  # half of the difference between the largest and the smallest sparsity of a block
    sparsity: float
    alpha: float
    beta: float
    fixed: Mapping[str, float] = field(default_factory=dict)  # sparsity by layer name


@dataclass(frozen=True)
class OutlierBudget:
    """A budget by outliers, and what it was computed from."""

    blocks: tuple[BlockBudget, ...]
    shares: tuple[float, ...]  # of outlying weights, of each block
    spread: float  # that was used


def allocate_by_outliers(
    context: StageContext, hidden: Samples, settings: OutlierSettings, scratch: Scratch
) -> OutlierBudget:
    """Give each block its share of the sparsity by its outlying weights. Warns if the spread had to be smaller.

    Args:
        context: The model and its N samples.
        hidden: The input of block 0, N samples (T, H).
        settings: Prunable layers, spread and sparsity.
        scratch: Space for the hidden states between the blocks.

    Raises:
        BudgetError: The budget is infeasible even with a spread of 0.
    """
    names = {layer.name for block in settings.blocks for layer in block}
    shares = outlier_shares(context, hidden, names, scratch)
    budget, spread = budget_by_outliers(
        *(settings.blocks, shares, settings.spread, settings.sparsity, settings.alpha, settings.beta, settings.fixed)
    )
    if spread != settings.spread:
        context.callbacks.warn(f"the spread of the budget is {spread:g}: no layer can be pruned above 100% or below 0%")
    return OutlierBudget(budget, tuple(shares), spread)


@torch.no_grad()
def outlier_shares(context: StageContext, hidden: Samples, prunable: Collection[str], scratch: Scratch) -> list[float]:
    """The share of outlying weights of each block, over its layers whose names are in `prunable`.

    Args:
        context: The model and its N samples.
        hidden: The input of block 0, N samples (T, H).
        prunable: Names of layers in the whole model.
        scratch: Space for the hidden states between the blocks.
    """
    model, num_samples = context.model, len(context.inputs)
    counter = Counter(context.callbacks, model.num_blocks * num_samples, "samples")
    passed = scratch.stream("hidden", num_samples, tuple(hidden[0].shape), context.device.torch_dtype)
    shares = []
    for index in range(model.num_blocks):
        block = context.block(index).load()
        infos = [x for x in model.layers(index) if x.name in prunable]
        layers = {x.path: block.get_submodule(x.path) for x in infos}
        squares: dict[str, Tensor] = {}
        handles = [layer.register_forward_pre_hook(_adder(squares, path)) for path, layer in layers.items()]
        runner = context.block(index).runner(block)
        runner.propagate(hidden if index == 0 else passed, passed, context.callbacks.check_stop, counter.advance)
        for handle in handles:
            handle.remove()
        _share_among_experts(squares, infos)
        shares.append(_outlying_share(model, layers, squares))
    return shares


def _adder(squares: dict[str, Tensor], path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        squares[path] = squares.get(path, 0) + x.square().sum(dim=0)

    return add


def _share_among_experts(squares: dict[str, Tensor], layers: Sequence[LayerInfo]) -> None:
    """Give experts that received no token the sum of the experts that did."""
    for unread in [layer for layer in layers if layer.path not in squares]:
        peers = [x.path for x in layers if x.peers is not None and x.peers == unread.peers and x.path in squares]
        squares[unread.path] = torch.stack([squares[path] for path in peers]).sum(dim=0)


def _outlying_share(model: BlockModel, layers: Mapping[str, nn.Module], squares: Mapping[str, Tensor]) -> float:
    num_outlying = size = 0
    for path, layer in layers.items():
        scores = model.weight_matrix(layer).abs() * squares[path].sqrt()
        num_outlying += int((scores > _OUTLYING * scores.mean()).sum())
        size += scores.numel()
    return num_outlying / size if size else 0.0
