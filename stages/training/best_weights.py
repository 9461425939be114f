"""Copy of a block's parameters, in memory or in scratch space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.interfaces import Scratch, Stream


class BestWeights:
    """Copy of a block's parameters, which each `save` overwrites.

    spill: scratch space for the copy, as streams of one sample; None: in memory.
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
            self.save()

    def save(self) -> None:
        """Copy the current parameters."""
        self.set({name: parameter.detach() for name, parameter in self._parameters.items()})

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Replace the copy by `values`, by parameter name; names that are not parameters are ignored."""
        for name, copy in self._copies.items():
            copy.copy_(values[name])
        for name, stream in self._streams.items():
            stream.write(0, values[name])

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copy back to the block's parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._copies[name] if name in self._copies else self._streams[name][0])

    def tensors(self) -> dict[str, Tensor]:
        """The copy, by parameter name. The caller must not change it."""
        return self._copies or {name: stream[0] for name, stream in self._streams.items()}
