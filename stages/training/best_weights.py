"""A block's parameters as they were at one moment, in memory or where there is room for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.interfaces import Scratch, Stream


class Snapshot:
    """One moment of a block's parameters, taken anew as often as one likes into the same room.

    spill: where they are kept, as streams of one sample; None: in memory, beside the block.
    """

    def __init__(self, block: nn.Module, spill: Scratch | None = None) -> None:
        self._parameters = dict(block.named_parameters())
        self._copies: dict[str, Tensor] = {}
        self._streams: dict[str, Stream] = {}
        for name, parameter in self._parameters.items():
            if spill is None:
                self._copies[name] = parameter.detach().clone()
            else:
                self._streams[name] = spill.stream(f"best {name}", 1, tuple(parameter.shape), parameter.dtype)
        if spill is not None:
            self.take()

    def take(self) -> None:
        """Keep the parameters as they are now."""
        self.set({name: parameter.detach() for name, parameter in self._parameters.items()})

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Keep these instead, by the parameters' names; other entries of a block's state do not count."""
        for name, copy in self._copies.items():
            copy.copy_(values[name])
        for name, stream in self._streams.items():
            stream.write(0, values[name])

    @torch.no_grad()
    def give_back(self) -> None:
        """Make the block's parameters what they were."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._copies[name] if name in self._copies else self._streams[name][0])

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name; not to be changed."""
        return self._copies or {name: stream[0] for name, stream in self._streams.items()}
