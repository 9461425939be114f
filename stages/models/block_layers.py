"""Which layers of a decoder's block can be pruned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.errors import UsageError
from stages.models.base import LayerInfo
from stages.models.experts import experts_in, is_router, peers_of, token_share
from stages.models.layer_roles import VITAL, role_of

# Blocks whose linear layers hold less of their matrix weights than this are refused: the rest would stay dense.
_SMALLEST_SHARE = 0.95


def matrix_of(layer: nn.Module) -> Tensor:
    """A view of a linear layer's weight as (rows, cols)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def prunable_layers(block: nn.Module, prefix: str, config: Any) -> tuple[LayerInfo, ...]:
    """The linear layers of a block, in the order of the module; routers among experts are vital, whatever their name.

    Args:
        block: On `meta`, its experts separated (`stages.models.experts`).
        prefix: Of its names in the model: "model.layers.0.".
        config: The configuration of the model.
    """
    infos = []
    experts = experts_in(block)
    for path, module in block.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        rows, cols = matrix_of(module).shape
        role = VITAL if experts and is_router(path) else role_of(path)
        place = (prefix + path, path, role, rows, cols, isinstance(module, Conv1D))
        owner = next((owner for owner in experts if path.startswith(f"{owner}.")), None)
        if owner is None:
            infos.append(LayerInfo(*place))
        else:
            infos.append(LayerInfo(*place, peers_of(path, owner), token_share(config, experts[owner])))
    return tuple(infos)


def require_reachable(block: nn.Module, layers: tuple[LayerInfo, ...], block_index: int, model: str) -> None:
    """Raise UsageError, naming the model, if too many matrix weights of a block lie outside its layers."""
    paths, has_experts = {layer.path for layer in layers}, bool(experts_in(block))
    matrices = {
        key: parameter.numel()
        for key, parameter in block.named_parameters()
        if parameter.ndim >= 2 and not (has_experts and is_router(key.rpartition(".")[0]))
    }
    others = {key: size for key, size in matrices.items() if key.rpartition(".")[0] not in paths}
    total = sum(matrices.values())
    if total == 0 or total - sum(others.values()) < _SMALLEST_SHARE * total:
        share = 1 - sum(others.values()) / total if total else 0.0
        largest = max(others, key=others.__getitem__) if others else None
        raise UsageError(
            f"{model}: only {share:.0%} of the matrix weights of block {block_index} lie in linear layers (the "
            f"largest that does not: {_described(block, largest)}); such models cannot be pruned"
        )


def _described(block: nn.Module, key: str | None) -> str:
    """A weight by its name, shape and the class that holds it: "experts.weight, (8, 64, 32) in a ParallelExperts"."""
    if key is None:
        return "none"
    owner = type(block.get_submodule(key.rpartition(".")[0])).__name__
    return f"{key}, {tuple(block.get_parameter(key).shape)} in a {owner}"
