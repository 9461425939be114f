"""Prune one block, and compute its output from its biased input (LAMP Algorithm 1, lines 4-5).

All statistics of a block come from one pass of the unpruned block over the biased stream. Layers that read the same
input (q, k and v; gate and up) share one set of statistics and its factorization.

N: samples.    T: tokens of a sample.    H: hidden size.
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
from stages.models.experts import every_token_to_every_expert
from stages.pruners.base import LayerProblem, Pruner
from stages.quantization.grid import fit_grid
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.runtime.block_runner import Counter
from stages.runtime.expert_statistics import ExpertTokens, complete
from stages.runtime.layer_inputs import LayerInput, LayerInputs, collect
from stages.sparsity.budget import BlockBudget
from stages.sparsity.outcome import LayerOutcome, PruneOutcome, require_budget


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning, and the outcome of each layer."""

    outcome: PruneOutcome
    state: Mapping[str, Tensor] | None = None  # fp32, for refinement; None: the block is finished
    finished: FinishedBlock | None = None  # in the export dtype; None: the block is not finished
    experts: ExpertTokens | None = None  # calibration tokens of the experts; None: it has none, or no data was read


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
        pruner: The pruner, with its options.
        budget: How many weights of each layer are pruned. Layers that it does not name stay dense.
        biased: The block's input of each of N samples, (T, H); None for a pruner that needs no data.
        state: The block's compensated weights, by their names inside the block; None: the original weights.
        output: The export dtypes and the output stream; None: leave the block in fp32 for refinement.

    Returns:
        The outcome of each layer; with `output`, the finished block, else its state in fp32.

    Raises:
        NumericalError: A weight is not finite, or a Hessian has no Cholesky factor. The message names block and layer.
        ValueError: The pruner needs data, and there is none.
    """
    block = context.load(state)
    by_name = {layer.name: layer for layer in budget.layers}
    infos = [info for info in context.model.layers(context.index) if info.name in by_name]
    modules = {info.path: block.get_submodule(info.path) for info in infos}
    kind = pruner.statistics()
    num_passes = int(kind is not None) + int(output is not None and output.stream is not None)
    progress = _Progress(context.callbacks, len(infos) + num_passes * len(context.inputs))
    experts = None
    if kind is not None:
        if biased is None or not len(context.inputs):
            raise ValueError(f"{pruner.name} needs the calibration set and the biased stream")
        with every_token_to_every_expert(block, is_on=pruner.options.calibrates_all_experts):
            progress.collected = collect(context, block, modules, biased, kind, progress)
        experts = complete(progress.collected, infos, kind, context.device.torch_device)
        if experts is not None and experts.num_short:
            context.callbacks.warn(f"{context.name}: {experts}")
    layers = _Layers(context, pruner, progress.collected)
    # Layers with the same input follow each other, so that only one factorization is in memory.
    for info in layers.ordered(infos):
        progress.boundary()
        layers.prune(info, modules[info.path], by_name[info.name].num_masked)
        progress.advance()
    outcome = PruneOutcome({info.name: layers.outcomes[info.name] for info in infos}, pruner.options.pattern)
    layers.free()
    require_budget(outcome, budget)
    if output is None:
        state = {name: tensor.to("cpu") for name, tensor in block.state_dict().items()}
        return PrunedBlock(outcome, state=state, experts=experts)
    finished = finish_block(context, block, outcome, biased, output, progress)
    return PrunedBlock(outcome, finished=finished, experts=experts)


class _Progress(Counter):
    """Reports progress over samples and layers. A checkpoint holds the statistics; a resumed step prunes again."""

    def __init__(self, callbacks: Callbacks, total: int) -> None:
        super().__init__(callbacks, total, "passes")
        self._callbacks = callbacks
        self.collected: LayerInputs | None = None

    def boundary(self) -> None:
        """Stop here if requested; keep a checkpoint of the statistics."""
        if self.collected is None:
            self._callbacks.check_stop()
        else:
            self._callbacks.checkpoint(self.collected.checkpoint)


class _Layers:
    """Prunes the layers of one block. Keeps the result of `Pruner.prepare` for the layers with the same input."""

    def __init__(self, context: BlockContext, pruner: Pruner, collected: LayerInputs | None) -> None:
        self._context, self._pruner = context, pruner
        self._inputs = collected.inputs if collected is not None else []
        self._input_of = collected.by_path if collected is not None else {}
        self._prepared: tuple[LayerInput, Any] | None = None
        self.outcomes: dict[str, LayerOutcome] = {}

    def ordered(self, infos: list[LayerInfo]) -> list[LayerInfo]:
        """The layers, sorted so that those with the same input follow each other."""
        return sorted(infos, key=lambda info: self._inputs.index(self._input_of[info.path]) if self._inputs else 0)

    def prune(self, info: LayerInfo, module: nn.Module, num_masked: int) -> None:
        """Prune one layer in place and keep its outcome."""
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
            self._prepared = None  # first free the old one: each may be as large as the statistics
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

    def free(self) -> None:
        """Free the last result of `Pruner.prepare`."""
        self._prepared = None
