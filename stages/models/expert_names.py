"""Where the matrices of experts lie in a model's files.

Most checkpoints hold each expert's matrices as tensors of their own, under the names of the family's first
implementation (`block_sparse_moe.experts.3.w1.weight`). Others hold those of all experts of a block in one 3-D tensor,
as transformers does in memory. Which name means what is read from transformers' own table of conversions.

E: experts.    I: width of an expert.    H: hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from stages.formats.tensor_parts import TensorPart
from stages.models.experts import ExpertShape

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class _Held:
    """One parameter of transformers' module, which holds the matrices or biases of all experts."""

    shape: ExpertShape
    name: str  # "gate_up_proj", "up_proj", "down_proj"; a bias ends with "_bias"

    @property
    def is_bias(self) -> bool:
        return self.name.endswith("_bias")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of an expert that it holds, in their order."""
        plain = self.name.removesuffix("_bias")
        return ("gate_proj", "up_proj") if plain == "gate_up_proj" else (plain,)

    def entry(self, number: int, layer: str) -> str:
        """The name of one expert's matrix or bias in the model's state."""
        return f"{self.shape.path}.{number}.{layer}.{'bias' if self.is_bias else 'weight'}"


def place_experts(
    stored: Iterable[str],
    shapes: Sequence[ExpertShape],
    transforms: Sequence[Any],
    prefix: str,
    shape_of: Callable[[str], tuple[int, ...]],
) -> dict[str, TensorPart]:
    """Where each entry of the experts' state lies in the files, by the entry's name in the model's state.

    Entries that no file holds are absent.

    Args:
        stored: The names in the files.
        shapes: The experts of the model.
        transforms: transformers' conversions for this model.
        prefix: Of the base model, which names in the files may lack or have in addition.
        shape_of: The shape of a stored tensor.
    """
    held = {f"{held.shape.path}.{held.name}": held for shape in shapes for held in _held_by(shape)}
    own = {held.entry(number, layer): None for held in held.values() for number, layer in _members(held)}
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found: dict[str, TensorPart] = {}
    for key in stored if shapes else ():
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        plain = next((n for n in _with_prefixes((key, name), prefix) if n in own), None)
        if plain is not None:
            found.setdefault(plain, TensorPart(key))
            continue
        converted = _convert(name, converters)
        target = next((n for n in _with_prefixes((converted.target,), prefix) if n in held), None)
        if target is not None:
            for entry, part in _parts(held[target], converted, key, shape_of(key)):
                found.setdefault(entry, part)
    return found


@dataclass(frozen=True)
class _Converted:
    """A stored name as transformers converts it."""

    target: str
    number: int | None = None  # of the expert, if the tensor is one expert's
    source: int = 0  # which of the sources of the conversion: gate, then up
    operations: tuple[Any, ...] = ()


def _held_by(shape: ExpertShape) -> Iterator[_Held]:
    for name in ("gate_up_proj" if shape.is_gated else "up_proj", "down_proj"):
        yield _Held(shape, name)
        if shape.has_bias:
            yield _Held(shape, f"{name}_bias")


def _members(held: _Held) -> Iterator[tuple[int, str]]:
    for number in range(held.shape.num_experts):
        for layer in held.layers:
            yield number, layer


def _with_prefixes(names: Iterable[str], prefix: str) -> Iterator[str]:
    for name in names:
        yield from (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


def _convert(name: str, converters: Sequence[Any]) -> _Converted:
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is None:
            continue
        source = list(converter.source_patterns).index(pattern)
        number = None
        if isinstance(converter.operations[0], MergeModulelist):
            matched = converter.compiled_sources.search(name)
            numbers = _NUMBER.findall(matched.group(0)) if matched is not None else []
            number = int(numbers[-1]) if numbers else None
        return _Converted(target, number, source, tuple(converter.operations))
    return _Converted(name)


def _parts(
    held: _Held, converted: _Converted, key: str, stored_shape: tuple[int, ...]
) -> Iterator[tuple[str, TensorPart]]:
    """The entries that one stored tensor holds. None for a conversion that is not known here."""
    kinds = [type(operation) for operation in converted.operations]
    if converted.number is not None and kinds in ([MergeModulelist], [MergeModulelist, Concatenate]):
        is_transposed = held.shape.is_transposed and not held.is_bias
        part = TensorPart(key, stored_shape, transposed=True) if is_transposed else TensorPart(key)
        yield held.entry(converted.number, held.layers[converted.source]), part
        return
    if stored_shape[0] != held.shape.num_experts or any(kind not in (Transpose, Interleave) for kind in kinds):
        return
    is_transposed = held.shape.is_transposed
    for operation in converted.operations:
        if isinstance(operation, Transpose):
            is_transposed ^= not operation.check_dims or stored_shape[1:] != _held_shape(held)[1:]
    is_interleaved = held.shape.is_interleaved ^ (Interleave in kinds)
    for number, layer in _members(held):
        rows = _rows(held, layer, is_interleaved=is_interleaved)
        yield (
            held.entry(number, layer),
            TensorPart(key, stored_shape, number, transposed=is_transposed and not held.is_bias, rows=rows),
        )


def _held_shape(held: _Held) -> tuple[int, ...]:
    shape = held.shape
    rows, cols = (shape.width * len(held.layers), shape.hidden)
    if held.name.startswith("down_proj"):
        rows, cols = shape.hidden, shape.width
    return (shape.num_experts, cols, rows) if shape.is_transposed else (shape.num_experts, rows, cols)


def _rows(held: _Held, layer: str, *, is_interleaved: bool) -> tuple[int, int, int] | None:
    """Which rows of the stored matrix are those of the layer; None: all."""
    if len(held.layers) == 1:
        return None
    width, place = held.shape.width, held.layers.index(layer)
    return (place, 2 * width, 2) if is_interleaved else (place * width, (place + 1) * width, 1)
