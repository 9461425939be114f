"""What a model gives its blocks beside the hidden state, asked of the model as rarely as it can be.

Masks and position embeddings depend on how long a sample is and on nothing else, in every decoder that is known here;
so one answer serves all samples of a shape, and the embeddings, often as large as a block, need not stay in memory. A
model whose calls do depend on the tokens is found out by asking it about several inputs, and then asked every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.machine.device import DeviceChoices, computing
from stages.models.base import BlockCall, Ends


class CachedBlockInputs:
    """The calls of a model's blocks, on one device. Build one per model: it keeps what it has learnt."""

    def __init__(self, load_ends: Callable[[], Ends], drop_ends: Callable[[], None]) -> None:
        """load_ends: the model's entrance. drop_ends: it will not be needed again for now."""
        self._load_ends, self._drop_ends = load_ends, drop_ends
        self._known: dict[tuple[Any, ...], tuple[BlockCall, ...]] = {}
        self._depend_on_inputs: bool | None = None

    @torch.no_grad()
    def depend_on_inputs(self, example: Tensor, choices: DeviceChoices) -> bool:
        """Whether they differ between inputs of one shape. example: a sample's inputs, as the first of a batch."""
        if self._depend_on_inputs is None:
            ends = self._load_ends()
            others = (torch.zeros_like(example), example.flip(-1))
            with computing(choices):
                first, *rest = (ends.enter(inputs).calls for inputs in (example, *others))
            self._depend_on_inputs = not all(_same(first, other) for other in rest)
            if not self._depend_on_inputs:
                self._known[_key(example, choices)] = first
                self._drop_ends()
        return self._depend_on_inputs

    @torch.no_grad()
    def of(self, inputs: Tensor, choices: DeviceChoices) -> tuple[BlockCall, ...]:
        """One call for each block. inputs: a batch, on the device; only its shape matters if nothing else does."""
        key = _key(inputs, choices)
        if not self.depend_on_inputs(inputs[:1], choices) and key in self._known:
            return self._known[key]
        with computing(choices):
            calls = self._load_ends().enter(inputs).calls
        if not self._depend_on_inputs:
            self._known[key] = calls
            self._drop_ends()
        return calls


def _key(inputs: Tensor, choices: DeviceChoices) -> tuple[Any, ...]:
    return (*inputs.shape, choices.dtype)


def _same(left: Any, right: Any) -> bool:
    """Whether two values of a call are equal to the last bit. What is not known to be is not."""
    if isinstance(left, Tensor):
        same_kind = isinstance(right, Tensor) and left.dtype == right.dtype and left.shape == right.shape
        return same_kind and torch.equal(left, right)
    if isinstance(left, BlockCall):
        return isinstance(right, BlockCall) and _same(left.args, right.args) and _same(left.kwargs, right.kwargs)
    if isinstance(left, Mapping):
        same_keys = isinstance(right, Mapping) and left.keys() == right.keys()
        return same_keys and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, Sequence) and not isinstance(left, str):
        same_length = isinstance(right, Sequence) and len(left) == len(right)
        return same_length and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return left is right or (isinstance(left, str | int | float | bool) and left == right)
