"""Entries of a block's state as parts of larger tensors in a model's files.

Most entries are a tensor of their own. The matrices of experts may be stored in one tensor for all experts of a block,
gate and up together, transposed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorPart:
    """Where an entry lies in a model's files."""

    key: str  # name of the tensor there
    shape: tuple[int, ...] | None = None  # of the tensor, if this is not the tensor as it is stored
    expert: int | None = None  # index into the first dimension
    transposed: bool = False  # the files have (cols, rows)
    rows: tuple[int, int, int] | None = None  # start, stop, step among the rows; None: all
    cols: tuple[int, int, int] | None = None  # the same among the columns

    def of(self, stored: Tensor) -> Tensor:
        """A view of this part of the stored tensor, rows first."""
        part = stored if self.expert is None else stored[self.expert]
        part = part.mT if self.transposed else part
        part = part if self.rows is None else part[slice(*self.rows)]
        return part if self.cols is None else part[:, slice(*self.cols)]


def gather(parts: Mapping[str, TensorPart], load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The entries by name. Each stored tensor is loaded once, and freed before the next one that is cut."""
    by_key: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_key.setdefault(part.key, []).append(name)
    found: dict[str, Tensor] = {}
    for key, names in by_key.items():
        stored = load(key)
        for name in names:
            part = parts[name]
            found[name] = part.of(stored).clone(memory_format=torch.contiguous_format) if _is_cut(part) else stored
    return {name: found[name] for name in parts}


def scatter(parts: Mapping[str, TensorPart], entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors, by their names in the files, that hold all the entries: `gather` undone."""
    stored: dict[str, Tensor] = {}
    for name, tensor in entries.items():
        part = parts[name]
        if not _is_cut(part):
            stored[part.key] = tensor
            continue
        if part.key not in stored:
            assert part.shape is not None
            stored[part.key] = torch.empty(part.shape, dtype=tensor.dtype, device=tensor.device)
        part.of(stored[part.key]).copy_(tensor)
    return stored


def _is_cut(part: TensorPart) -> bool:
    return part.shape is not None
