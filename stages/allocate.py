"""A budget that looks at the data: blocks with more outlying weights lose less (OWL, Yin et al., 2024).

A weight is outlying if |w| |x| is more than 5 times the mean of its layer, |x| the norm of its input channel over the
calibration set. The blocks' shares of such weights, from one pass of the original model, are spread over an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from stages.interfaces import Callbacks, Scratch, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.runtime.block_runner import BlockPass, Counter
from stages.sparsity.budget import BlockBudget, BudgetError, LayerShape, allocate

_OUTLYING = 5.0
# Offsets that are too large for a layer are made smaller by steps of one in so many.
_STEPS = 10


@torch.no_grad()
def outlier_shares(
    model: BlockModel,
    inputs: Stream,
    hidden: Stream,
    prunable: Collection[str],
    scratch: Scratch,
    choices: DeviceChoices,
    callbacks: Callbacks,
) -> list[float]:
    """The share of outlying weights of each block, over its layers whose names are in `prunable`.

    inputs: token ids of the N samples. hidden: N samples (tokens, hidden), the input of block 0.
    """
    counter = Counter(callbacks, model.num_blocks * len(inputs), "samples")
    passed = scratch.stream("hidden", len(inputs), tuple(hidden[0].shape), choices.torch_dtype)
    shares = []
    for block_index in range(model.num_blocks):
        block = model.load_block(block_index, choices.torch_device)
        layers = {x.path: block.get_submodule(x.path) for x in model.layers(block_index) if x.name in prunable}
        squares: dict[str, Tensor] = {}
        handles = [layer.register_forward_pre_hook(_adder(squares, path)) for path, layer in layers.items()]
        source = hidden if block_index == 0 else passed
        block_pass = BlockPass(model, block, block_index, inputs, choices)
        block_pass.propagate(source, passed, callbacks.check_stop, counter.advance)
        for handle in handles:
            handle.remove()
        shares.append(_outlying_share(model, layers, squares))
    return shares


def _adder(squares: dict[str, Tensor], path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        squares[path] = squares.get(path, 0) + x.square().sum(dim=0)

    return add


def _outlying_share(model: BlockModel, layers: Mapping[str, nn.Module], squares: Mapping[str, Tensor]) -> float:
    num_outlying = size = 0
    for path, layer in layers.items():
        scores = model.weight_matrix(layer).abs() * squares[path].sqrt()
        num_outlying += int((scores > _OUTLYING * scores.mean()).sum())
        size += scores.numel()
    return num_outlying / size if size else 0.0


def budget_by_outliers(
    blocks: Sequence[Sequence[LayerShape]],
    shares: Sequence[float],
    spread: float,
    sparsity: float,
    alpha: float,
    beta: float,
    fixed: Mapping[str, float] | None = None,
) -> tuple[tuple[BlockBudget, ...], float]:
    """The count of every layer, and the spread that was used: `spread`, or less where a layer has not so many weights.

    shares: of outlying weights, one a block. The block with the most of them loses 2 * spread less of its weights than
    the one with the fewest, the others lie between; then alpha, beta and `fixed` act as in `allocate`.
    """
    sizes = [sum(layer.size for layer in block if layer.name not in (fixed or {})) for block in blocks]
    for step in range(_STEPS, -1, -1):
        used = Fraction(str(spread)) * step / _STEPS
        try:
            offsets = _offsets(shares, sizes, used)
            return allocate(blocks, sparsity, alpha, beta, fixed, offsets), float(used)
        except BudgetError:
            if step == 0:
                raise
    raise AssertionError("a spread of 0 was not tried")


def _offsets(shares: Sequence[float], sizes: Sequence[int], spread: Fraction) -> list[Fraction]:
    """What to add to each block's sparsity; over all weights it adds up to nothing."""
    exact = [Fraction(share) for share in shares]
    low, high = min(exact), max(exact)
    if high == low or not sum(sizes):
        return [Fraction(0)] * len(exact)
    kept = [2 * spread * (share - low) / (high - low) for share in exact]
    mean = sum((k * size for k, size in zip(kept, sizes, strict=True)), Fraction(0)) / sum(sizes)
    return [mean - k for k in kept]
