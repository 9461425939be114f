"""Prune one block, and compute its output from its biased input (LAMP Algorithm 1, lines 4-5).

All statistics of a block come from the unpruned block and the biased stream: from one pass, or, where they do not fit
into memory together, from several (`stages.runtime.statistics_passes`). Layers that read the same input (q, k and v;
gate and up) share one set of statistics and its factorization.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.finish_block import FinishedBlock, finish_block
from stages.interfaces import Checkpoint, Samples
from stages.models.base import LayerInfo
from stages.models.experts import every_token_to_every_expert, only_experts
from stages.pruners.base import LayerProblem, Pruner
from stages.quantization.grid import Grid, fit_grid
from stages.runtime.block_context import BlockContext, BlockOutput
from stages.runtime.expert_statistics import ExpertTokens
from stages.runtime.layer_inputs import LayerInput, collect, find_inputs
from stages.runtime.statistics_passes import StatisticsPasses
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
    room_bytes: int | None = None,
) -> PrunedBlock:
    """Prune a block to its budget, and propagate the biased stream through the result.

    Args:
        context: The block and its samples.
        pruner: The pruner, with its options.
        budget: How many weights of each layer are pruned. Layers that it does not name stay dense.
        biased: The block's input of each of N samples, (T, H); None for a pruner that needs no data.
        state: The block's compensated weights, by their names inside the block; None: the original weights.
        output: The export dtypes and the output stream; None: leave the block in fp32 for refinement.
        room_bytes: How many bytes statistics may take at once; None: any number. The result does not depend on it.

    Returns:
        The outcome of each layer; with `output`, the finished block, else its state in fp32.

    Raises:
        NumericalError: A weight is not finite, or a Hessian has no Cholesky factor. The message names block and layer.
        ValueError: The pruner needs data, and there is none.
    """
    block = context.load(state)
    by_name = {layer.name: layer for layer in budget.layers}
    infos = [info for info in context.model.layers(context.index) if info.name in by_name]
    layers = _Layers(context, pruner, block, infos, budget)
    layers.require_finite()
    kind = pruner.statistics()
    progress = _Progress(context, layers, has_output=output is not None and output.stream is not None)
    experts = None
    if kind is None:
        for info in infos:
            progress.boundary()
            layers.prune(info.path, None)
            progress.show()
    else:
        if biased is None or not len(context.inputs):
            raise ValueError(f"{pruner.name} needs the calibration set and the biased stream")
        with every_token_to_every_expert(block, is_on=pruner.options.calibrates_all_experts):
            inputs = find_inputs(context, block, layers.modules, biased, with_digests=room_bytes is not None)
            progress.passes = passes = StatisticsPasses(inputs, kind, context.device.torch_device, room_bytes)
            progress.restore()
            _announce(context, passes, room_bytes)
            while passes.begin():
                if passes.is_complete:
                    layers.prune_readers(passes.current[0], progress)
                    passes.finish_first()
                else:
                    with only_experts(block, None if passes.needs_all_experts else layers.experts_of(passes.current)):
                        collect(context, block, layers.modules, biased, passes.current, passes.to_count, progress)
                    _complete(context, passes)
        experts = ExpertTokens.of(infos, passes.tokens, kind)
        if experts is not None and experts.num_short:
            context.callbacks.warn(f"{context.name}: {experts}")
    outcome = PruneOutcome({info.name: layers.outcomes[info.path] for info in infos}, pruner.options.pattern)
    require_budget(outcome, budget)
    if output is None:
        state = {name: tensor.to("cpu") for name, tensor in block.state_dict().items()}
        return PrunedBlock(outcome, state=state, experts=experts)
    finished = finish_block(context, block, outcome, biased, output, progress)
    return PrunedBlock(outcome, finished=finished, experts=experts)


def _announce(context: BlockContext, passes: StatisticsPasses, room_bytes: int | None) -> None:
    """Tell the user if one pass is not enough. Without the block's number: it is said once for equal blocks."""
    if room_bytes is not None and passes.num_planned > 1:
        context.callbacks.warn(
            f"statistics of a block take {passes.size_bytes / 1e9:.3g} GB, and {room_bytes / 1e9:.3g} GB are left for "
            f"them: {passes.num_planned} passes over its inputs collect them"
        )


def _complete(context: BlockContext, passes: StatisticsPasses) -> None:
    """End a pass, and tell the user if more of them are needed than was said before: the first one counts tokens."""
    num_planned = passes.num_planned
    passes.complete()
    if (num_more := passes.num_planned - num_planned) > 0:
        context.callbacks.warn(
            f"{context.name}: {num_more} more of these passes, as experts with few tokens need the statistics of all"
        )


class _Progress:
    """Reports progress over passes and layers. A checkpoint holds the statistics in memory and the pruned layers."""

    def __init__(self, context: BlockContext, layers: _Layers, *, has_output: bool) -> None:
        self._callbacks, self._num_all = context.callbacks, len(context.inputs)
        self._layers, self._has_output, self._num_propagated = layers, has_output, 0
        self.passes: StatisticsPasses | None = None

    @property
    def num_samples(self) -> int:
        """Samples that the statistics of the current pass hold."""
        assert self.passes is not None
        return self.passes.num_samples

    def restore(self) -> None:
        """Go on from the checkpoint if there is one."""
        assert self.passes is not None
        checkpoint = self._callbacks.restore()
        if checkpoint is not None and "pruned" in checkpoint.figures:  # otherwise of an earlier version: begin again
            self.passes.restore(checkpoint)
            self._layers.restore(checkpoint)
            self.show()

    def boundary(self) -> None:
        """Stop here if requested; keep a checkpoint."""
        if self.passes is None:
            self._callbacks.check_stop()
        else:
            self._callbacks.checkpoint(self._checkpoint)

    def collected(self, count: int) -> None:
        """The current pass holds `count` more samples."""
        assert self.passes is not None
        self.passes.num_samples += count
        self.show()

    def advance(self, count: int = 1) -> None:
        """The output of `count` more samples is written."""
        self._num_propagated += count
        self.show()

    def show(self) -> None:
        """Report what is done: samples of all passes, and layers."""
        done, num_passes = len(self._layers.outcomes) + self._num_propagated, int(self._has_output)
        if self.passes is not None:
            done += self.passes.num_passes * self._num_all
            done += 0 if self.passes.is_complete else self.passes.num_samples
            num_passes += self.passes.num_planned
        self._callbacks.report(done, self._layers.count + num_passes * self._num_all, "passes")

    def _checkpoint(self) -> Checkpoint:
        assert self.passes is not None
        statistics, layers = self.passes.checkpoint(), self._layers.checkpoint()
        return Checkpoint({**statistics.tensors, **layers.tensors}, {**statistics.figures, **layers.figures})


class _Layers:
    """Prunes the layers of one block in place. Keeps the result of `Pruner.prepare` for those with the same input."""

    def __init__(
        self, context: BlockContext, pruner: Pruner, block: nn.Module, infos: Sequence[LayerInfo], budget: BlockBudget
    ) -> None:
        self._context, self._pruner = context, pruner
        num_masked = {layer.name: layer.num_masked for layer in budget.layers}
        self._names = {info.path: info.name for info in infos}
        self._experts = {info.path: info.expert for info in infos}
        self._num_masked = {info.path: num_masked[info.name] for info in infos}
        self._prepared: Any = None
        self.modules = {info.path: block.get_submodule(info.path) for info in infos}
        self.outcomes: dict[str, LayerOutcome] = {}  # by path

    def require_finite(self) -> None:
        """Raise NumericalError, naming block and layer, if a weight is NaN or infinite."""
        for path, module in self.modules.items():
            if not bool(torch.isfinite(self._context.model.weight_matrix(module)).all()):
                raise NumericalError(f"{self._context.name}, layer {path}: the weights hold NaN or infinity")

    def experts_of(self, inputs: Iterable[LayerInput]) -> set[str]:
        """The experts whose layers read these inputs, by their paths in the block."""
        experts = {self._experts[path] for found in inputs for path in found.source.paths}
        return {expert for expert in experts if expert is not None}

    @property
    def count(self) -> int:
        """Number of layers to prune."""
        return len(self.modules)

    def prune_readers(self, found: LayerInput, progress: _Progress) -> None:
        """Prune the layers that read an input, as far as they are not pruned yet."""
        for path in found.source.paths:
            if path not in self.outcomes:
                progress.boundary()
                self.prune(path, found)
                progress.show()
        self._prepared = None  # it may be as large as the statistics

    def prune(self, path: str, found: LayerInput | None) -> None:
        """Prune one layer in place and keep its outcome.

        Args:
            path: Of the layer, in the block.
            found: The statistics of its input; None for a pruner that needs none.
        """
        module, where = self.modules[path], f"{self._context.name}, layer {path}"
        weight = self._context.model.weight_matrix(module)
        if found is not None and self._prepared is None:
            self._prepared = self._prepare(found, where)
        grid = self._fit_grid(weight)
        problem = LayerProblem(self._names[path], weight, self._num_masked[path], grid)
        pruned = self._pruner.prune(problem, self._prepared)
        error = found.statistics.relative_error(weight, pruned.weight) if found is not None else None
        self._context.model.set_weight_matrix(module, pruned.weight)
        self.outcomes[path] = LayerOutcome(pruned.mask, grid, error, pruned.damping)

    def _prepare(self, found: LayerInput, where: str) -> Any:
        try:
            return self._pruner.prepare(
                found.statistics,
                is_shared=found.source.is_shared,
                warn=lambda message: self._context.callbacks.warn(f"{where}: {message}"),
            )
        except NumericalError as failure:
            raise NumericalError(f"{where}: {failure}") from failure

    def _fit_grid(self, weight: Tensor) -> Grid | None:
        options = self._pruner.options
        return fit_grid(weight, options.bits, options.group_size) if options.bits is not None else None

    def checkpoint(self) -> Checkpoint:
        """The pruned layers."""
        model, tensors = self._context.model, dict[str, Tensor]()
        for path, outcome in self.outcomes.items():
            tensors[f"weight.{path}"] = model.weight_matrix(self.modules[path])
            tensors[f"mask.{path}"] = outcome.mask
        pruned = [
            {"path": path, "relative_error": outcome.relative_error, "damping": outcome.damping}
            for path, outcome in self.outcomes.items()
        ]
        return Checkpoint(tensors, {"pruned": pruned})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the pruned layers of a checkpoint into the block, which holds its unpruned weights."""
        model, device = self._context.model, self._context.device.torch_device
        for layer in checkpoint.figures["pruned"]:
            path, module = layer["path"], self.modules[layer["path"]]
            grid = self._fit_grid(model.weight_matrix(module))
            model.set_weight_matrix(module, checkpoint.tensors[f"weight.{path}"].to(device))
            mask = checkpoint.tensors[f"mask.{path}"].to(device)
            self.outcomes[path] = LayerOutcome(mask, grid, layer["relative_error"], layer["damping"])
