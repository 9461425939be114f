"""Train a pruned block with its pruning masks fixed: only kept weights change, and only they have moments.

Quantized weights stay on their quantization grid: the forward pass rounds them, and the gradient ignores the rounding
(straight-through estimator, Bengio et al., 2013).

R, C: rows and columns of a layer's weight.    K: kept weights of a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stages.models.base import BlockModel
from stages.quantization.grid import Grid
from stages.sparsity.outcome import PruneOutcome
from stages.training.rates import Rate

_ORIGINAL = ".parametrizations.weight.original"
_ADAM = "adam."
_FACTOR = "factor"


@contextlib.contextmanager
def kept_masked(
    model: BlockModel,
    block: nn.Module,
    block_index: int,
    outcome: PruneOutcome,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[None]:
    """Context in which training keeps masked weights at zero, and quantized layers compute with weights on their grid.

    Without a grid, the gradient of masked weights is zeroed: then Adam's moments and steps of them are zero, too. With
    a grid, the layer computes with a rounded copy of the weight that is trained.

    Args:
        model: Of the block.
        block: To be trained.
        block_index: From 0.
        outcome: Pruning masks and quantization grids of its layers.
        dtypes: The export dtypes by names inside the block: quantized layers compute with the grid's values in these.
            None: in fp32.
    """
    infos = {info.name: info for info in model.layers(block_index) if info.name in outcome.layers}
    handles, rounded = [], []
    for name, info in infos.items():
        module, layer = block.get_submodule(info.path), outcome.layers[name]
        mask = layer.mask.T if info.transposed else layer.mask
        with torch.no_grad():
            module.weight.masked_fill_(mask, 0)  # type: ignore[operator]
        if layer.grid is None:
            parameter: nn.Parameter = module.weight  # type: ignore[assignment]
            handles.append(_without_gradient(parameter, mask))
        else:
            dtype = torch.float32 if dtypes is None else dtypes[f"{info.path}.weight"]
            on_grid = _OnGrid(layer.mask, layer.grid, dtype, info.transposed)
            parametrize.register_parametrization(module, "weight", on_grid)
            rounded.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in rounded:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def kept_of(model: BlockModel, block_index: int, outcome: PruneOutcome) -> dict[str, Tensor]:
    """Where the kept weights of a block's pruned layers are: True, by name of the parameter, in the shape stored."""
    infos = {info.name: info for info in model.layers(block_index)}
    kept = {}
    for name, layer in outcome.layers.items():
        info = infos[name]
        kept[f"{info.path}.weight"] = ~(layer.mask.T if info.transposed else layer.mask)
    return kept


def exact_on_grid(
    model: BlockModel, block_index: int, outcome: PruneOutcome, state: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """A block's state with the exact grid values of quantized layers in fp32.

    In 16 bits a value may have moved past the middle between two grid values, and would be rounded to the other one.

    Args:
        model: Of the block.
        block_index: From 0.
        outcome: Quantization grids of its layers.
        state: In the export dtypes, by names inside the block.
    """
    exact = {}
    for info in model.layers(block_index):
        layer, name = outcome.layers.get(info.name), f"{info.path}.weight"
        if layer is None or layer.grid is None or state[name].dtype == torch.float32:
            continue
        stored = state[name].to(layer.mask.device)
        stored = stored.T if info.transposed else stored
        codes = layer.grid.codes_of_stored(stored)
        values = layer.grid.values(codes).masked_fill(layer.mask, 0)
        exact[name] = values.T if info.transposed else values
    return {**state, **exact} if exact else state


class KeptAdam:
    """Adam over a block's parameters. Of a pruned layer, the kept weights alone have moments.

    A step is that of `torch.optim.Adam` on the vector of the kept weights.
    """

    def __init__(self, block: nn.Module, kept: Mapping[str, Tensor], rate: Rate) -> None:
        """Begin without moments.

        Args:
            block: On the device, with `kept_masked` in force.
            kept: Where the kept weights of pruned layers are (`kept_of`), on the device.
            rate: A relative one refers to the weights that the block has now, unless `load` restores others.
        """
        self._parameters = {plain_name(name): parameter for name, parameter in block.named_parameters()}
        self._kept = kept
        self._factors = rate.factors(self._parameters)
        self._moments: dict[str, dict[str, Tensor]] = {}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the weights by their gradients, and drop the gradients. rate: before the factor of each tensor."""
        vectors: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:  # an expert that got no token of this batch has none
                vectors[name] = nn.Parameter(self._select(name, parameter))
                vectors[name].grad = self._select(name, parameter.grad)
                parameter.grad = None
        if not vectors:
            return
        groups = [{"params": [vector], "lr": rate * self._factors[name]} for name, vector in vectors.items()]
        optimizer = torch.optim.Adam(groups, fused=True)
        for name, vector in vectors.items():
            if name in self._moments:
                optimizer.state[vector] = self._moments[name]
        optimizer.step()
        for name, vector in vectors.items():
            self._moments[name] = dict(optimizer.state[vector])
            if name in self._kept:
                self._parameters[name].masked_scatter_(self._kept[name], vector)
            else:
                self._parameters[name].copy_(vector)

    def tensors(self) -> dict[str, Tensor]:
        """The moments, (K,) each, the number of steps and the rate's factors, by names that begin with "adam."."""
        moments = {f"{_ADAM}{key}.{name}": t for name, state in self._moments.items() for key, t in state.items()}
        factors = {
            f"{_ADAM}{_FACTOR}.{name}": torch.tensor(factor, dtype=torch.float64)
            for name, factor in self._factors.items()
        }
        return {**moments, **factors}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave; other names are ignored."""
        self._moments = {}
        for label in tensors:
            if not label.startswith(_ADAM):
                continue
            key, _, name = label.removeprefix(_ADAM).partition(".")
            if key == _FACTOR:
                self._factors[name] = tensors[label].item()
            else:
                device = self._parameters[name].device
                self._moments.setdefault(name, {})[key] = tensors[label].to(device)

    def _select(self, name: str, values: Tensor) -> Tensor:
        """The kept ones of a parameter's values, (K,); all of them in their shape if it is not pruned."""
        return values.masked_select(self._kept[name]) if name in self._kept else values.detach().clone()


def plain_name(name: str) -> str:
    """A parameter's name in the block, also while its layer computes on a grid."""
    return f"{name.removesuffix(_ORIGINAL)}.weight" if name.endswith(_ORIGINAL) else name


def plain_state(block: nn.Module) -> dict[str, Tensor]:
    """The block's state by plain names: of a quantized layer the weight that is trained, not the rounded one."""
    return {plain_name(name): tensor for name, tensor in block.state_dict().items()}


def without_moments(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among tensors that hold Adam's moments, too."""
    return {name: tensors[name] for name in tensors if not name.startswith(_ADAM)}


def _without_gradient(parameter: nn.Parameter, mask: Tensor) -> Any:
    """Register a hook that zeroes the parameter's gradient under the mask. Returns the handle that removes it."""

    def zero(changed: Tensor) -> None:
        assert changed.grad is not None
        changed.grad.masked_fill_(mask, 0)

    parameter.requires_grad_(True)
    return parameter.register_post_accumulate_grad_hook(zero)


class _OnGrid(nn.Module):
    """Parametrization of a quantized layer: kept weights rounded to the grid and its dtype, masked weights zero."""

    def __init__(self, mask: Tensor, grid: Grid, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self._mask, self._grid, self._dtype, self._transposed = mask, grid, dtype, transposed

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.T if self._transposed else weight
        matrix = _Rounded.apply(matrix, self._grid, self._dtype).masked_fill(self._mask, 0)
        return matrix.T if self._transposed else matrix


class _Rounded(torch.autograd.Function):
    """Round to the nearest values of a grid, as a dtype has them; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        return grid.nearest(matrix).to(dtype).to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
