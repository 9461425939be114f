"""Weights of a model that its files hold as several tensors, one below the other.

transformers packs the convolutions of query, key and value of a linear attention into one when it loads OLMo Hybrid or
Kimi Linear. Here such a weight consists of the tensors of the files, so that each of them is trained and exported under
its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D


def separate_pieces(
    model: nn.Module,
    stored: Iterable[str],
    transforms: Sequence[Any],
    prefix: str,
    shape_of: Callable[[str], tuple[int, ...]],
) -> dict[str, str]:
    """Let each weight that the files hold in pieces consist of them, in place.

    The weight of a linear layer stays as it is: it would have to be pruned in pieces.

    Args:
        model: On `meta`.
        stored: The names in the files.
        transforms: transformers' conversions for this model.
        prefix: Of the base model, which names in the files may lack or have in addition.
        shape_of: The shape of a stored tensor.

    Returns:
        For each new entry of the model's state, its name in the files.
    """
    state = model.state_dict(keep_vars=True)
    found: dict[str, str] = {}
    for name, keys in _pieces(stored, transforms, prefix, frozenset(state)).items():
        path, _, parameter = name.rpartition(".")
        owner, shapes = model.get_submodule(path), [shape_of(key) for key in keys]
        is_whole = (sum(shape[0] for shape in shapes), *shapes[0][1:]) == tuple(state[name].shape)
        if parameter != "weight" or isinstance(owner, nn.Linear | Conv1D) or not is_whole:
            continue
        del owner.weight
        for number, (key, shape) in enumerate(zip(keys, shapes, strict=True)):
            owner.register_parameter(f"weight_{number}", nn.Parameter(torch.empty(shape, device="meta")))
            found[f"{path}.weight_{number}"] = key
        owner.__class__ = type(type(owner).__name__, (_PackedWeight, type(owner)), {"num_pieces": len(keys)})
    return found


class _PackedWeight(nn.Module):
    """A module whose weight is made of pieces each time it is used; the class of the family's module comes after it."""

    num_pieces: int

    @property
    def weight(self) -> Tensor:
        """All pieces, one below the other."""
        return torch.cat([self.get_parameter(f"weight_{number}") for number in range(self.num_pieces)])


def _pieces(
    stored: Iterable[str], transforms: Sequence[Any], prefix: str, wanted: frozenset[str]
) -> dict[str, list[str]]:
    """For the model's weights that the files hold in pieces: the names of all pieces, in their order."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter) and _concatenates_rows(t)]
    found: dict[str, dict[int, str]] = {}
    num_pieces: dict[str, int] = {}
    for key in stored if converters else ():
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            candidates = (target, f"{prefix}.{target}", target.removeprefix(f"{prefix}."))
            whole = next((candidate for candidate in candidates if candidate in wanted), None)
            if pattern is not None and whole is not None:
                patterns = list(converter.source_patterns)
                found.setdefault(whole, {})[patterns.index(pattern)] = key
                num_pieces[whole] = len(patterns)
    return {
        whole: [keys[number] for number in range(num_pieces[whole])]
        for whole, keys in found.items()
        if len(keys) == num_pieces[whole]
    }


def _concatenates_rows(converter: WeightConverter) -> bool:
    operation = converter.operations[0]
    return len(converter.operations) == 1 and isinstance(operation, Concatenate) and operation.dim == 0
