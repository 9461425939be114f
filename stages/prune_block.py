"""Lines 4-5 of the paper's Algorithm 1: prune one block, then run the biased stream through it.

All statistics of a block come from one pass of the unpruned block over the biased stream. Layers that see the
same input (q, k and v; gate and up) share one Hessian and one factorisation of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.budget import BlockBudget
from stages.capture import batch_of_one
from stages.device import DeviceChoices, computing
from stages.errors import NumericalError
from stages.models.base import BlockModel
from stages.protocols import Hooks, Stream
from stages.pruners.hessian import Factor, HessianSum, factorise
from stages.pruners.magnitude import magnitude_mask
from stages.pruners.sparsegpt import sparsegpt
from stages.pruners.wanda import wanda_mask


@dataclass(frozen=True)
class PruneSettings:
    """How to prune: the pruner inside LAMP is SparseGPT."""

    method: str  # "lamp", "sparsegpt", "wanda", "magnitude"
    damping: float = 0.01  # of the mean diagonal of the Hessian
    column_block: int = 128  # columns that share one mask decision


@dataclass(frozen=True)
class PrunedLayer:
    """What happened to one layer."""

    name: str
    num_masked: int
    num_other_zeros: int  # zeros that nobody asked for: dead columns, rounding, zeros of the original
    relative_error: float | None  # |W x - W' x|^2 / |W x|^2 over the calibration set; None without data
    damping: float | None  # what the factorisation needed in the end


@dataclass(frozen=True)
class PrunedBlock:
    """A block's new state, in the export dtype, and what happened to each layer."""

    state: dict[str, Tensor]
    layers: tuple[PrunedLayer, ...]


@dataclass
class _LayerInputs:
    """Statistics of one distinct input, and which layers read it."""

    hessian: HessianSum
    paths: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_block(
    model: BlockModel,
    block_index: int,
    budget: BlockBudget,
    settings: PruneSettings,
    choices: DeviceChoices,
    hooks: Hooks,
    *,
    state: Mapping[str, Tensor] | None = None,
    export_dtypes: Mapping[str, torch.dtype],
    inputs: Stream | None = None,
    biased: Stream | None = None,
    biased_out: Stream | None = None,
) -> PrunedBlock:
    """Prune block `block_index` to its budget and run the biased stream through the result.

    state: the block's weights (compensated ones, names relative to the block); None: the original's.
    export_dtypes: dtype of each entry of the block's state in the exported model. The weights are rounded to it
    before `biased_out` is computed, so that later blocks see what the user's model will compute.
    inputs: token ids of the N samples; biased, biased_out: N samples (tokens, hidden). Magnitude needs none.
    Raises NumericalError, naming block and layer, where a Hessian has no usable factor.
    """
    device = choices.torch_device
    block = model.load_block(block_index, device, state=state)
    by_name = {layer.name: layer for layer in budget.layers}
    infos = [info for info in model.layers(block_index) if info.name in by_name]
    modules = {info.path: block.get_submodule(info.path) for info in infos}

    groups: list[_LayerInputs] = []
    num_passes = (1 if inputs is not None else 0) + (1 if biased_out is not None else 0)
    total = len(infos) + num_passes * (len(inputs) if inputs is not None else 0)
    progress = _Progress(hooks, total)
    if settings.method != "magnitude":
        if inputs is None or biased is None:
            raise ValueError(f"{settings.method} needs the calibration set and the biased stream")
        groups = _collect(model, block, block_index, modules, inputs, biased, choices, progress)
    group_of = {path: group for group in groups for path in group.paths}

    factors: dict[int, Factor] = {}
    masks: dict[str, Tensor] = {}
    figures: dict[str, tuple[float | None, float | None]] = {}
    # Group by group, so that each Hessian goes as soon as its layers are done.
    for info in sorted(infos, key=lambda i: groups.index(group_of[i.path]) if groups else 0):
        hooks.check_stop()
        weight = model.weight_matrix(modules[info.path])
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"block {block_index}, layer {info.path}: the weights hold NaN or infinity")
        num_masked = by_name[info.name].num_masked
        group = group_of.get(info.path)
        factor = None
        if settings.method in ("lamp", "sparsegpt") and group is not None:
            if id(group) not in factors:
                factors.clear()
                where = f"block {block_index}, layer {info.path}"
                factors[id(group)] = factorise(group.hessian.matrix(), settings.damping, on_retry=_Named(hooks, where))
            factor = factors[id(group)]
        pruned, mask = _prune_matrix(weight, num_masked, group, factor, settings)
        error = _relative_error(weight, pruned, group.hessian.matrix()) if group is not None else None
        model.set_weight_matrix(modules[info.path], pruned)
        masks[info.path] = mask
        figures[info.name] = (error, factor.damping if factor else None)
        progress.advance()

    rounded = {name: tensor.to("cpu", export_dtypes[name]) for name, tensor in block.state_dict().items()}
    _load_rounded(block, rounded)
    layers = []
    for info in infos:
        zeros = model.weight_matrix(modules[info.path]) == 0
        num_masked = int(masks[info.path].sum())
        if num_masked != by_name[info.name].num_masked or bool((masks[info.path] & ~zeros).any()):
            raise AssertionError(f"{info.name}: the mask does not hold its budget of {by_name[info.name].num_masked}")
        error, damping = figures[info.name]
        layers.append(PrunedLayer(info.name, num_masked, int(zeros.sum()) - num_masked, error, damping))

    if biased_out is not None and inputs is not None and biased is not None:
        propagate(model, block, block_index, inputs, biased, biased_out, choices, progress)
    return PrunedBlock(rounded, tuple(layers))


def propagate(
    model: BlockModel,
    block: nn.Module,
    block_index: int,
    inputs: Stream,
    stream_in: Stream,
    stream_out: Stream | None,
    choices: DeviceChoices,
    progress: _Progress,
) -> None:
    """Run every sample of `stream_in` through the block; keep the results in `stream_out` if there is one."""
    device = choices.torch_device
    ends = model.load_ends(device, part="enter")
    for index in range(len(inputs)):
        progress.hooks.check_stop()
        with computing(choices):
            call = ends.enter(batch_of_one(inputs[index], device)).calls[block_index]
            hidden = model.run_block(block, batch_of_one(stream_in[index], device), call)
        if stream_out is not None:
            stream_out.write(index, hidden[0])
        progress.advance()


@dataclass(frozen=True)
class _Named:
    """Warns, saying where."""

    hooks: Hooks
    where: str

    def __call__(self, message: str) -> None:
        self.hooks.warn(f"{self.where}: {message}")


class _Progress:
    def __init__(self, hooks: Hooks, total: int) -> None:
        self.hooks, self._done, self._total = hooks, 0, total

    def advance(self) -> None:
        self._done += 1
        self.hooks.report(self._done, self._total, "passes")


def _collect(
    model: BlockModel,
    block: nn.Module,
    block_index: int,
    modules: Mapping[str, nn.Module],
    inputs: Stream,
    biased: Stream,
    choices: DeviceChoices,
    progress: _Progress,
) -> list[_LayerInputs]:
    """Sums over the inputs of every layer, one sum per distinct input, from one pass over the stream."""
    groups: list[_LayerInputs] = []
    seen: dict[int, tuple[Tensor, _LayerInputs]] = {}  # in the current sample: the tensor itself, kept alive
    assigned: dict[str, _LayerInputs] = {}

    def hook(path: str, cols: int) -> object:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            _, group = seen.get(id(x), (None, None))
            first_reader = group is None
            if group is None:
                group = assigned.get(path)
            if group is None:
                group = _LayerInputs(HessianSum(cols, x.device))
                groups.append(group)
            if assigned.setdefault(path, group) is not group:
                raise AssertionError(f"{path} shared its input with other layers in one sample but not in another")
            if path not in group.paths:
                group.paths.append(path)
            if first_reader:
                seen[id(x)] = (x, group)
                group.hessian.add(x.reshape(-1, cols))

        return record

    handles = [
        module.register_forward_pre_hook(hook(path, model.weight_matrix(module).shape[1]))  # type: ignore[arg-type]
        for path, module in modules.items()
    ]
    device = choices.torch_device
    ends = model.load_ends(device, part="enter")
    try:
        for index in range(len(inputs)):
            progress.hooks.check_stop()
            seen.clear()
            with computing(choices):
                call = ends.enter(batch_of_one(inputs[index], device)).calls[block_index]
                model.run_block(block, batch_of_one(biased[index], device), call)
            progress.advance()
    finally:
        for handle in handles:
            handle.remove()
    unread = [path for path in modules if path not in assigned]
    if unread:
        raise AssertionError(f"block {block_index}: no input ever reached {', '.join(unread)}")
    return groups


def _prune_matrix(
    weight: Tensor, num_masked: int, group: _LayerInputs | None, factor: Factor | None, settings: PruneSettings
) -> tuple[Tensor, Tensor]:
    """New weights (rows, cols) and the mask, True where pruned."""
    if factor is not None:
        return sparsegpt(weight, factor, num_masked, column_block=settings.column_block)
    if settings.method == "magnitude":
        mask = magnitude_mask(weight, num_masked)
    elif settings.method == "wanda" and group is not None:
        mask = wanda_mask(weight, group.hessian.mean_square(), num_masked)
    else:
        raise ValueError(f"unknown method {settings.method}")
    return weight.masked_fill(mask, 0), mask


def _relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float | None:
    """|(W - W') X|^2 / |W X|^2, from the Hessian 2/n X X^T alone."""
    lost, whole = after - before, before
    energy = torch.sum((whole @ hessian) * whole)
    return (torch.sum((lost @ hessian) * lost) / energy).item() if energy > 0 else None


def _load_rounded(block: nn.Module, rounded: Mapping[str, Tensor]) -> None:
    """Put the values of the export dtype into the fp32 block."""
    for name, tensor in block.state_dict().items():
        tensor.copy_(rounded[name])
