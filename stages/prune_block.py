"""Lines 4-5 of the paper's Algorithm 1: prune one block, then propagate the biased stream through it.

All statistics of a block come from one pass of the unpruned block over the biased stream. Layers that read the same
input (q, k and v; gate and up) share one set of statistics and one factorisation of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Callbacks, Samples
from stages.models.base import LayerInfo
from stages.pruners.base import LayerProblem, Pruner
from stages.quantization.grid import fit_grid
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.runtime.block_runner import Counter
from stages.runtime.layer_inputs import LayerInput, LayerInputs, collect
from stages.sparsity.budget import BlockBudget
from stages.sparsity.outcome import LayerOutcome, PruneOutcome, require_budget


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning, and what happened to each layer."""

    outcome: PruneOutcome
    state: Mapping[str, Tensor] | None = None  # in fp32, to be trained further; None: the block is finished
    finished: FinishedBlock | None = None  # in the export dtype; None: the block is not finished yet


@torch.no_grad()
def prune_block(
    context: BlockContext,
    pruner: Pruner,
    budget: BlockBudget,
    biased: Samples | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    output: BlockOutput | None,
) -> PrunedBlock:
    """Prune a block to its budget, and propagate the biased stream through the result.

    Args:
        context: The block and its samples.
        pruner: Chooses and solves, with its options.
        budget: How many weights each layer loses; layers that it does not name stay dense.
        biased: The block's input of each of N samples, (T, H); None for a pruner that reads no data.
        state: The block's compensated weights (names inside the block); None: the original weights.
        output: How the block is exported and where its outputs go; None: leave it in fp32 for a later step.

    Raises:
        NumericalError: A weight is not finite, or a Hessian has no usable factor; names block and layer.
    """
    block = context.load(state)
    by_name = {layer.name: layer for layer in budget.layers}
    infos = [info for info in context.model.layers(context.index) if info.name in by_name]
    modules = {info.path: block.get_submodule(info.path) for info in infos}
    num_passes = (1 if pruner.needs_data else 0) + (1 if output is not None and output.stream is not None else 0)
    progress = _Progress(context.callbacks, len(infos) + num_passes * len(context.inputs))
    kind = pruner.statistics()
    if pruner.needs_data and kind is not None:
        if biased is None or not len(context.inputs):
            raise ValueError(f"{pruner.name} needs the calibration set and the biased stream")
        progress.collected = collect(context, block, modules, biased, kind, progress)
    layers = _Layers(context, pruner, progress.collected)
    # Input by input, so that each set of statistics is freed as soon as its layers are done.
    for info in layers.ordered(infos):
        progress.boundary()
        layers.prune(info, modules[info.path], by_name[info.name].num_masked)
        progress.advance()
    outcome = PruneOutcome({info.name: layers.outcomes[info.name] for info in infos}, pruner.options.pattern)
    layers.forget()
    require_budget(outcome, budget)
    if output is None:
        return PrunedBlock(outcome, state={name: tensor.to("cpu") for name, tensor in block.state_dict().items()})
    return PrunedBlock(outcome, finished=finish_block(context, block, outcome, biased, output, progress))


class _Progress(Counter):
    """Counts passes and layers. From a checkpoint the statistics come back; the layers are pruned again."""

    def __init__(self, callbacks: Callbacks, total: int) -> None:
        super().__init__(callbacks, total, "passes")
        self._callbacks = callbacks
        self.collected: LayerInputs | None = None

    def boundary(self) -> None:
        """Stop here if asked to, and keep the statistics."""
        if self.collected is None:
            self._callbacks.check_stop()
        else:
            self._callbacks.checkpoint(self.collected.checkpoint)


class _Layers:
    """Prunes the layers of one block; what `Pruner.prepare` gives is kept while layers with the same input follow."""

    def __init__(self, context: BlockContext, pruner: Pruner, collected: LayerInputs | None) -> None:
        self._context, self._pruner = context, pruner
        self._inputs = collected.inputs if collected is not None else []
        self._input_of = collected.by_path if collected is not None else {}
        self._prepared: tuple[LayerInput, Any] | None = None
        self.outcomes: dict[str, LayerOutcome] = {}

    def ordered(self, infos: list[LayerInfo]) -> list[LayerInfo]:
        """The layers, those with the same input one after the other."""
        return sorted(infos, key=lambda info: self._inputs.index(self._input_of[info.path]) if self._inputs else 0)

    def prune(self, info: LayerInfo, module: nn.Module, num_masked: int) -> None:
        """Prune one layer in place, and keep what happened to it."""
        model, options = self._context.model, self._pruner.options
        weight, where = model.weight_matrix(module), f"{self._context.name}, layer {info.path}"
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{where}: the weights hold NaN or infinity")
        found = self._input_of.get(info.path)
        prepared = self._prepare(found, where) if found is not None else None
        grid = fit_grid(weight, options.bits, options.group_size) if options.bits is not None else None
        pruned = self._pruner.prune(LayerProblem(info.name, weight, num_masked, grid), prepared)
        error = found.statistics.relative_error(weight, pruned.weight) if found is not None else None
        model.set_weight_matrix(module, pruned.weight)
        self.outcomes[info.name] = LayerOutcome(pruned.mask, grid, error, pruned.damping)

    def _prepare(self, found: LayerInput, where: str) -> Any:
        if self._prepared is None or self._prepared[0] is not found:
            self._prepared = None  # not two at once: each may be as large as the statistics
            try:
                prepared = self._pruner.prepare(
                    found.statistics,
                    is_shared=found.is_shared,
                    warn=lambda message: self._context.callbacks.warn(f"{where}: {message}"),
                )
            except NumericalError as failure:
                raise NumericalError(f"{where}: {failure}") from failure
            self._prepared = (found, prepared)
        return self._prepared[1]

    def forget(self) -> None:
        """Free what was prepared."""
        self._prepared = None
