"""Context objects that every stage takes: the model, the samples, the device and the callbacks.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.interfaces import Callbacks, Samples, Stream
from stages.machine.device import DeviceChoices
from stages.models.base import BlockModel
from stages.runtime.block_runner import BlockRunner


@dataclass(frozen=True)
class StageContext:
    """A model, its calibration samples, the device and the callbacks."""

    model: BlockModel
    inputs: Samples  # the model's input of each of N samples, such as token ids (T,); empty if no data is read
    device: DeviceChoices
    callbacks: Callbacks

    def block(self, index: int) -> BlockContext:
        """The context of block `index`, counted from 0."""
        return BlockContext(self.model, index, self.inputs, self.device, self.callbacks)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """The shape of one sample's hidden state."""
        return self.model.hidden_shape(tuple(self.inputs[0].shape))


@dataclass(frozen=True)
class BlockContext:
    """One block of a model, with the same samples, device and callbacks."""

    model: BlockModel
    index: int  # of the block, from 0
    inputs: Samples
    device: DeviceChoices
    callbacks: Callbacks

    @property
    def name(self) -> str:
        """The block, for messages."""
        return f"block {self.index}"

    def load(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The block on the device in fp32, with its original weights or, by name inside the block, those of `state`."""
        return self.model.load_block(self.index, self.device.torch_device, state=state)

    def runner(self, block: nn.Module) -> BlockRunner:
        """A runner of `block` over the samples."""
        return BlockRunner(self.model, block, self.index, self.inputs, self.device)


@dataclass(frozen=True)
class BlockOutput:
    """The export dtypes of a finished block, and the stream of its outputs."""

    dtypes: Mapping[str, torch.dtype]  # of each entry of the block's state, in the exported model
    stream: Stream | None = None  # receives the finished block's output of each sample, (T, H); None: not needed
