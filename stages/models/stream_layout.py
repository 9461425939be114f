"""How all that a block hands on to the next lies in one tensor, so that streams keep a single tensor for each sample.

In most families that is the hidden state. Gemma 3n and DeepSeek V4 hand on several hidden states side by side. In Gemma
3n and Gemma 4 the last blocks read keys and values that earlier ones computed: these travel with the hidden state, too.

N: samples.    T: tokens.    H: hidden size.    S: hidden states side by side.    W: numbers of a token in a stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.base import BlockCall
from stages.models.recorder import output_of


@dataclass(frozen=True)
class SharedState:
    """Keys and values that one block computes and later blocks read."""

    key: str  # in the argument that holds them: "sliding_attention"
    shapes: tuple[tuple[int, int], ...]  # of each tensor (N, heads, T, head size): heads, head size

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class StreamLayout:
    """What the blocks of a model hand on, as one tensor (N, T, W)."""

    hidden_size: int
    num_hidden: int = 1  # S
    order: tuple[int, ...] = ()  # the axes of (N, T, S, H) as blocks take them: (2, 0, 1, 3); (): they take (N, T, H)
    argument: str = ""  # of a block: the mapping that it puts keys and values into; "": there is none
    shared: tuple[SharedState, ...] = ()

    @property
    def width(self) -> int:
        """W."""
        return self.num_hidden * self.hidden_size + sum(state.width for state in self.shared)

    def run(self, block: nn.Module, packed: Tensor, call: BlockCall) -> Tensor:
        """A block's output for its input, both (N, T, W)."""
        hidden = self.hidden(packed)
        if not self.argument:
            return self.packed(output_of(block(hidden, *call.args, **call.kwargs)))
        states: MutableMapping[str, Any] = type(call.kwargs[self.argument])(self._states(packed))
        output = output_of(block(hidden, *call.args, **{**call.kwargs, self.argument: states}))
        return self.packed(output, states)

    def packed(self, hidden: Tensor, states: Mapping[str, Any] | None = None) -> Tensor:
        """As one tensor (N, T, W).

        Args:
            hidden: (N, T, H), or (N, T, S, H) with its axes in `order`.
            states: Tensors (N, heads, T, head size) by key; those that are missing become zeros.
        """
        if self.order:
            hidden = hidden.permute([self.order.index(axis) for axis in range(4)]).flatten(2)
        parts = [hidden]
        for state in self.shared:
            tensors = (states or {}).get(state.key)
            if tensors is None:
                parts.append(parts[0].new_zeros(*parts[0].shape[:2], state.width))
            else:
                parts += [tensor.transpose(1, 2).flatten(2) for tensor in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def hidden(self, packed: Tensor) -> Tensor:
        """What a block takes as its hidden state: (N, T, H), or (N, T, S, H) with its axes in `order`."""
        if not self.order and not self.shared:
            return packed
        hidden = packed[..., : self.num_hidden * self.hidden_size]
        if self.order:
            hidden = hidden.unflatten(2, (self.num_hidden, self.hidden_size)).permute(self.order)
        return hidden.contiguous()

    def _states(self, packed: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """The shared states: tensors (N, heads, T, head size) by key."""
        found, start = {}, self.num_hidden * self.hidden_size
        for state in self.shared:
            tensors = []
            for heads, size in state.shapes:
                part = packed[..., start : start + heads * size].contiguous()
                tensors.append(part.unflatten(2, (heads, size)).transpose(1, 2))
                start += heads * size
            found[state.key] = tuple(tensors)
        return found
