"""Weights that transformers joins or splits when it loads a model, by its own table of conversions.

It packs the convolutions of query, key and value of a linear attention into one when it loads OLMo Hybrid or Kimi
Linear. Here such a weight consists of the tensors of the files, so that each of them is trained and exported under its
own name. It splits the rows of a projection of query, key and value when it loads Sarvam, and of an MLP when it loads
the largest DINOv2: such weights are parts of a tensor in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Chunk, Concatenate, Split, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from stages.formats.tensor_parts import TensorPart


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


def place_rows(
    stored: Iterable[str],
    wanted: Mapping[str, tuple[int, ...]],
    transforms: Sequence[Any],
    prefix: str,
    shape_of: Callable[[str], tuple[int, ...]],
) -> dict[str, TensorPart]:
    """Where those weights lie whose rows the files hold below those of others.

    Args:
        stored: The names in the files.
        wanted: The shapes of the model's weights, by their names in its state.
        transforms: transformers' conversions for this model.
        prefix: Of the base model, which names in the files may lack or have in addition.
        shape_of: The shape of a stored tensor.
    """
    splits = [t for t in transforms if isinstance(t, WeightConverter) and _splits_rows(t)]
    found: dict[str, TensorPart] = {}
    for key, name in _renamed(stored, transforms) if splits else ():
        for converter in splits:
            first, pattern = converter.rename_source_key(name)
            if pattern is None or key in wanted:
                continue
            patterns = converter.target_patterns
            places = [first.replace(patterns[0], pattern) for pattern in patterns]
            names = [_with_prefix(place, prefix, wanted) for place in places]
            if None not in names:
                found |= _rows_of([name for name in names if name], wanted, key, shape_of(key))
    return found


def _rows_of(
    names: Sequence[str], wanted: Mapping[str, tuple[int, ...]], key: str, stored_shape: tuple[int, ...]
) -> dict[str, TensorPart]:
    """Parts of one stored tensor, in the order of their rows. None if it does not have the shape of all together."""
    shapes = [wanted[name] for name in names]
    if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != stored_shape:
        return {}
    found, start = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        found[name] = TensorPart(key, stored_shape, rows=(start, start + shape[0], 1))
        start += shape[0]
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
    converters = [t for t in transforms if isinstance(t, WeightConverter) and _concatenates_rows(t)]
    found: dict[str, dict[int, str]] = {}
    num_pieces: dict[str, int] = {}
    for key, name in _renamed(stored, transforms) if converters else ():
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            whole = _with_prefix(target, prefix, wanted)
            if pattern is not None and whole is not None:
                patterns = list(converter.source_patterns)
                found.setdefault(whole, {})[patterns.index(pattern)] = key
                num_pieces[whole] = len(patterns)
    return {
        whole: [keys[number] for number in range(num_pieces[whole])]
        for whole, keys in found.items()
        if len(keys) == num_pieces[whole]
    }


def _renamed(stored: Iterable[str], transforms: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Each name in the files, and what transformers' renamings make of it."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    for key in stored:
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        yield key, name


def _with_prefix(name: str, prefix: str, wanted: Container[str]) -> str | None:
    """The name, with or without the prefix of the base model, that is wanted."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in wanted), None)


def _concatenates_rows(converter: WeightConverter) -> bool:
    operation = converter.operations[0]
    return len(converter.operations) == 1 and isinstance(operation, Concatenate) and operation.dim == 0


def _splits_rows(converter: WeightConverter) -> bool:
    operation = converter.operations[0]
    is_split = isinstance(operation, Split) or (isinstance(operation, Chunk) and operation.num_shards_attribute is None)
    return len(converter.operations) == 1 and is_split and operation.dim == 0 and len(converter.source_patterns) == 1
