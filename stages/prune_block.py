"""Lines 4-5 of the paper's Algorithm 1: prune one block, then run the biased stream through it.

All statistics of a block come from one pass of the unpruned block over the biased stream. Layers that see the
same input (q, k and v; gate and up) share one Hessian and one factorisation of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.errors import NumericalError
from stages.finish_block import FinishedBlock, LayerOutcome, PruneOutcome, finish_block, require_budget
from stages.interfaces import Callbacks, Checkpoint, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.pruners.alps import Splitting, alps, split
from stages.pruners.hessian import Factor, HessianSum, SquareSum, factorise
from stages.pruners.magnitude import magnitude_mask
from stages.pruners.sparsegpt import sparsegpt
from stages.pruners.wanda import wanda_mask
from stages.quantization.grid import Grid, fit_grid
from stages.runtime.block_runner import BlockPass, Counter
from stages.sparsity.budget import BlockBudget
from stages.sparsity.nm_pattern import Pattern


@dataclass(frozen=True)
class PruneSettings:
    """How to prune."""

    pruner: str  # "sparsegpt", "alps", "wanda", "magnitude"
    damping: float = 0.01  # of the mean diagonal of the Hessian
    column_block: int = 128  # columns that share one of SparseGPT's mask decisions
    pattern: Pattern | None = None  # N:M; the budget is then what it says
    bits: int | None = None  # quantize what is kept, in the same sweep
    group_size: int | None = None  # columns that share one grid; None: a whole row


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning, and what happened to each layer."""

    outcome: PruneOutcome
    state: dict[str, Tensor] | None = None  # in fp32; None: it is finished
    finished: FinishedBlock | None = None  # in the export dtype; None: it is not finished yet


@dataclass
class _LayerInputs:
    """Statistics of one distinct input, and which layers read it."""

    sums: HessianSum | SquareSum
    paths: list[str] = field(default_factory=list)


@dataclass
class _Collected:
    """The statistics of a block over the first `num_samples` samples."""

    groups: list[_LayerInputs] = field(default_factory=list)
    num_samples: int = 0

    def checkpoint(self) -> Checkpoint:
        states = [group.sums.state() for group in self.groups]
        return Checkpoint(
            {f"hessian.{number}": matrix for number, (matrix, _) in enumerate(states)},
            {
                "num_samples": self.num_samples,
                "groups": [
                    {"paths": group.paths, "counts": counts}
                    for group, (_, counts) in zip(self.groups, states, strict=True)
                ],
            },
        )

    @classmethod
    def restored(cls, checkpoint: Checkpoint | None, device: torch.device) -> _Collected:
        if checkpoint is None:
            return cls()
        groups = []
        for number, group in enumerate(checkpoint.figures["groups"]):
            kept = checkpoint.tensors[f"hessian.{number}"]
            kind = HessianSum if kept.ndim == 2 else SquareSum
            groups.append(_LayerInputs(kind.restored(kept, group["counts"], device), list(group["paths"])))
        return cls(groups, checkpoint.figures["num_samples"])


@torch.no_grad()
def prune_block(
    model: BlockModel,
    block_index: int,
    budget: BlockBudget,
    settings: PruneSettings,
    choices: DeviceChoices,
    callbacks: Callbacks,
    *,
    state: Mapping[str, Tensor] | None = None,
    export_dtypes: Mapping[str, torch.dtype] | None,
    inputs: Stream | None = None,
    biased: Stream | None = None,
    biased_out: Stream | None = None,
) -> PrunedBlock:
    """Prune block `block_index` to its budget and run the biased stream through the result.

    state: the block's weights (compensated ones, names relative to the block); None: the original's.
    export_dtypes: dtype of each entry of the block's state in the exported model; None: leave the block in fp32,
    unfinished, for a later step.
    inputs: token ids of the N samples; biased, biased_out: N samples (tokens, hidden). Magnitude needs none.
    Raises NumericalError, naming block and layer, where a Hessian has no usable factor.
    """
    block = model.load_block(block_index, choices.torch_device, state=state)
    by_name = {layer.name: layer for layer in budget.layers}
    infos = [info for info in model.layers(block_index) if info.name in by_name]
    modules = {info.path: block.get_submodule(info.path) for info in infos}
    groups: list[_LayerInputs] = []
    collected: _Collected | None = None
    num_passes = (1 if inputs is not None else 0) + (1 if biased_out is not None else 0)
    total = len(infos) + num_passes * (len(inputs) if inputs is not None else 0)
    counter = Counter(callbacks, total, "passes")
    if settings.pruner != "magnitude":
        if inputs is None or biased is None:
            raise ValueError(f"{settings.pruner} needs the calibration set and the biased stream")
        collected = _collect(model, block, block_index, modules, inputs, biased, settings, choices, callbacks, counter)
        groups = collected.groups
    group_of = {path: group for group in groups for path in group.paths}

    def boundary() -> None:
        """Later, the sums need not be made again; the layers are pruned anew."""
        if collected is None:
            callbacks.check_stop()
        else:
            callbacks.checkpoint(collected.checkpoint)

    solvers: dict[int, _Solver] = {}
    layers: dict[str, LayerOutcome] = {}
    # Group by group, so that each Hessian goes as soon as its layers are done.
    for info in sorted(infos, key=lambda i: groups.index(group_of[i.path]) if groups else 0):
        boundary()
        weight, where = model.weight_matrix(modules[info.path]), f"block {block_index}, layer {info.path}"
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{where}: the weights hold NaN or infinity")
        group = group_of.get(info.path)
        solver = None
        if settings.pruner in ("sparsegpt", "alps") and group is not None:
            if id(group) not in solvers:
                solvers.clear()
                try:
                    solvers[id(group)] = _Solver.of(group, settings, _Named(callbacks, where))
                except NumericalError as failure:
                    raise NumericalError(f"{where}: {failure}") from failure
            solver = solvers[id(group)]
        pruned, mask, grid = _prune_matrix(weight, by_name[info.name].num_masked, group, solver, settings)
        error = None
        if group is not None and isinstance(group.sums, HessianSum):
            error = _relative_error(weight, pruned, group.sums.matrix())
        model.set_weight_matrix(modules[info.path], pruned)
        layers[info.name] = LayerOutcome(mask, grid, error, solver.factor.damping if solver else None)
        counter.advance()
        del weight, pruned, mask

    solvers.clear()
    solver = None
    outcome = PruneOutcome({info.name: layers[info.name] for info in infos}, settings.pattern)
    require_budget(outcome, budget)
    if export_dtypes is None:
        return PrunedBlock(outcome, state={name: tensor.to("cpu") for name, tensor in block.state_dict().items()})
    finished = finish_block(
        *(model, block, block_index, outcome, choices, counter.advance),
        export_dtypes=export_dtypes,
        inputs=inputs,
        biased=biased,
        biased_out=biased_out,
        boundary=boundary,
    )
    return PrunedBlock(outcome, finished=finished)


@dataclass(frozen=True)
class _Named:
    """Warns, saying where."""

    callbacks: Callbacks
    where: str

    def __call__(self, message: str) -> None:
        self.callbacks.warn(f"{self.where}: {message}")


def _collect(
    model: BlockModel,
    block: nn.Module,
    block_index: int,
    modules: Mapping[str, nn.Module],
    inputs: Stream,
    biased: Stream,
    settings: PruneSettings,
    choices: DeviceChoices,
    callbacks: Callbacks,
    counter: Counter,
) -> _Collected:
    """Sums over the inputs of every layer, one sum per distinct input, from one pass over the stream.

    The pass ends where the last layer has got its input: what it and whatever follows would compute is of no use.
    """
    collected = _Collected.restored(callbacks.restore(), choices.torch_device)
    kind = SquareSum if settings.pruner == "wanda" else HessianSum
    groups = collected.groups
    seen: dict[int, tuple[Tensor, _LayerInputs]] = {}  # in the current batch: the tensor itself, kept alive
    waited_for: set[str] = set()  # layers that have not got their input in the current batch
    assigned = {path: group for group in groups for path in group.paths}

    def hook(path: str, cols: int) -> object:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            _, group = seen.get(id(x), (None, None))
            first_reader = group is None
            if group is None:
                group = assigned.get(path)
            if group is None:
                group = _LayerInputs(kind(cols, x.device))
                groups.append(group)
            if assigned.setdefault(path, group) is not group:
                raise AssertionError(f"{path} shared its input with other layers in one batch but not in another")
            if path not in group.paths:
                group.paths.append(path)
            if first_reader:
                seen[id(x)] = (x, group)
                group.sums.add(x.reshape(-1, cols))
            waited_for.discard(path)
            if not waited_for:
                raise _AllSeen

        return record

    handles = [
        module.register_forward_pre_hook(hook(path, model.weight_matrix(module).shape[1]))  # type: ignore[arg-type]
        for path, module in modules.items()
    ]
    counter.advance(collected.num_samples)
    block_pass = BlockPass(model, block, block_index, inputs, choices)
    batches = block_pass.batches(range(collected.num_samples, len(inputs)))
    try:
        with block_pass.reading(batches, biased) as read:
            for batch in read:
                callbacks.checkpoint(collected.checkpoint)
                waited_for.update(modules)
                with contextlib.suppress(_AllSeen):
                    block_pass.forward(batch.samples[0], batch.call)
                seen.clear()
                collected.num_samples += len(batch.numbers)
                counter.advance(len(batch.numbers))
    finally:
        for handle in handles:
            handle.remove()
    unread = [path for path in modules if path not in assigned]
    if unread:
        raise AssertionError(f"block {block_index}: no input ever reached {', '.join(unread)}")
    return collected


class _AllSeen(Exception):  # noqa: N818 - no error: all that was wanted is known
    """Ends a forward pass once every layer has got its input."""


@dataclass(frozen=True)
class _Solver:
    """What a Hessian is turned into once, for all layers with the same input."""

    hessian: Tensor
    factor: Factor
    splitting: Splitting | None  # ALPS

    @classmethod
    def of(cls, group: _LayerInputs, settings: PruneSettings, on_retry: Callable[[str], None]) -> _Solver:
        assert isinstance(group.sums, HessianSum)
        hessian = group.sums.matrix()
        factor = factorise(hessian, settings.damping, on_retry=on_retry)
        splitting = None
        if settings.pruner == "alps":
            splitting = split(hessian, factor, is_shared=len(group.paths) > 1)
        return cls(hessian, factor, splitting)


def _prune_matrix(
    weight: Tensor, num_masked: int, group: _LayerInputs | None, solver: _Solver | None, settings: PruneSettings
) -> tuple[Tensor, Tensor, Grid | None]:
    """New weights (rows, cols), the mask, True where pruned, and the grid that the weights were put on."""
    grid = fit_grid(weight, settings.bits, settings.group_size) if settings.bits is not None else None
    if solver is not None:
        chosen = None
        if settings.pruner == "alps":
            pruned, chosen = alps(
                weight, solver.hessian, solver.factor, num_masked, pattern=settings.pattern, splitting=solver.splitting
            )
            if grid is None:
                return pruned, chosen, None
        # With a grid, ALPS says which weights stay and the sweep puts them on it, each error passed on.
        pruned, mask = sparsegpt(
            weight,
            solver.factor,
            num_masked,
            pattern=settings.pattern,
            grid=grid,
            column_block=settings.column_block,
            mask=chosen,
        )
        return pruned, mask, grid
    if settings.pruner == "magnitude":
        mask = magnitude_mask(weight, num_masked, settings.pattern)
    elif settings.pruner == "wanda" and group is not None and isinstance(group.sums, SquareSum):
        mask = wanda_mask(weight, group.sums.mean_square(), num_masked, settings.pattern)
    else:
        raise ValueError(f"unknown pruner {settings.pruner}")
    kept = grid.nearest(weight) if grid is not None else weight
    return kept.masked_fill(mask, 0), mask, grid


def _relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float | None:
    """|(W - W') X|^2 / |W X|^2, from the Hessian 2/n X X^T alone."""
    lost, whole = after - before, before
    energy = torch.sum((whole @ hessian) * whole)
    return (torch.sum((lost @ hessian) * lost) / energy).item() if energy > 0 else None
