"""Where the matrices of experts lie in a model's files.

Most checkpoints hold each expert's matrices as tensors of their own, under the names of the family's first
implementation (`block_sparse_moe.experts.3.w1.weight`). Others hold those of all experts of a block in one tensor, as
transformers does in memory. Which name means what is read from transformers' own table of conversions.

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
from stages.models.expert_separation import ExpertParameter, ExpertShape

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class _Held:
    """One parameter of transformers' module, which holds the matrices or biases of all experts."""

    shape: ExpertShape
    parameter: ExpertParameter

    def entry(self, number: int, layer: str) -> str:
        """The name of one expert's matrix or bias in the model's state."""
        return f"{self.shape.path}.{number}.{layer}.{'bias' if self.parameter.is_bias else 'weight'}"

    def members(self) -> Iterator[tuple[int, str]]:
        """Each expert and layer whose rows it holds."""
        for number in range(self.shape.num_experts):
            for layer in self.parameter.layers:
                yield number, layer


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
    held = {f"{shape.path}.{part.name}": _Held(shape, part) for shape in shapes for part in shape.parameters}
    own = {held.entry(number, layer): None for held in held.values() for number, layer in held.members()}
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
    kinds, parameter = [type(operation) for operation in converted.operations], held.parameter
    if converted.number is not None and kinds in ([MergeModulelist], [MergeModulelist, Concatenate]):
        part = TensorPart(key, stored_shape, transposed=True) if parameter.is_transposed else TensorPart(key)
        yield held.entry(converted.number, parameter.layers[converted.source]), part
        return
    if parameter.is_flat:
        if not kinds and stored_shape == (held.shape.num_experts * parameter.shape[0], parameter.shape[1]):
            yield from _flat_parts(held, key, stored_shape)
        return
    if stored_shape[0] != held.shape.num_experts or any(kind not in (Transpose, Interleave) for kind in kinds):
        return
    is_transposed = parameter.is_transposed
    for operation in converted.operations:
        if isinstance(operation, Transpose):
            is_transposed ^= not operation.check_dims or stored_shape[1:] != parameter.shape
    is_interleaved = parameter.is_interleaved ^ (Interleave in kinds)
    for number, layer in held.members():
        rows = _rows(parameter, layer, is_interleaved=is_interleaved)
        transposed = is_transposed and not parameter.is_bias
        yield held.entry(number, layer), TensorPart(key, stored_shape, number, transposed=transposed, rows=rows)


def _flat_parts(held: _Held, key: str, stored_shape: tuple[int, ...]) -> Iterator[tuple[str, TensorPart]]:
    """The entries of a tensor that holds the experts' matrices one below the other."""
    size, is_transposed = held.parameter.shape[0], held.parameter.is_transposed
    for number, layer in held.members():
        place = (number * size, (number + 1) * size, 1)
        rows, cols = (None, place) if is_transposed else (place, None)
        part = TensorPart(key, stored_shape, transposed=is_transposed, rows=rows, cols=cols)
        yield held.entry(number, layer), part


def _rows(parameter: ExpertParameter, layer: str, *, is_interleaved: bool) -> tuple[int, int, int] | None:
    """Which rows of the stored matrix are those of the layer; None: all."""
    if len(parameter.layers) == 1:
        return None
    width, place = parameter.num_outputs, parameter.layers.index(layer)
    return (place, 2 * width, 2) if is_interleaved else (place * width, (place + 1) * width, 1)
