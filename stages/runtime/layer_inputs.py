"""Statistics over the inputs of a block's layers, one object per distinct input, from one pass over the stream.

Layers that read the same tensor (q, k and v; gate and up) share one set of statistics.

N: samples.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.interfaces import Checkpoint, Samples
from stages.pruners.base import Statistics
from stages.runtime.block_context import BlockContext
from stages.runtime.block_runner import Counter


@dataclass
class LayerInput:
    """Statistics of one distinct input, and the layers that read it."""

    statistics: Statistics
    paths: list[str] = field(default_factory=list)  # of the layers, in the block
    num_tokens: int = 0  # that reached the layers

    @property
    def is_shared(self) -> bool:
        """Whether several layers read this input."""
        return len(self.paths) > 1


@dataclass
class LayerInputs:
    """The statistics of a block over the first `num_samples` samples."""

    inputs: list[LayerInput] = field(default_factory=list)
    num_samples: int = 0
    is_completed: bool = False  # experts with few tokens have got those of others (`stages.runtime.expert_statistics`)

    @property
    def by_path(self) -> dict[str, LayerInput]:
        """The input of each layer."""
        return {path: found for found in self.inputs for path in found.paths}

    def checkpoint(self) -> Checkpoint:
        """Everything that `restored` needs."""
        states = [found.statistics.state() for found in self.inputs]
        return Checkpoint(
            {_tensor_key(number): sums for number, (sums, _) in enumerate(states)},
            {
                "num_samples": self.num_samples,
                "is_completed": self.is_completed,
                "groups": [
                    {"paths": found.paths, "counts": counts, "num_tokens": found.num_tokens}
                    for found, (_, counts) in zip(self.inputs, states, strict=True)
                ],
            },
        )

    @classmethod
    def restored(cls, checkpoint: Checkpoint | None, kind: type[Statistics], device: torch.device) -> LayerInputs:
        """The statistics of a checkpoint; empty statistics without one."""
        if checkpoint is None:
            return cls()
        inputs = [
            LayerInput(
                kind.restored(checkpoint.tensors[_tensor_key(number)], group["counts"], device),
                list(group["paths"]),
                group.get("num_tokens", 0),
            )
            for number, group in enumerate(checkpoint.figures["groups"])
        ]
        return cls(inputs, checkpoint.figures["num_samples"], checkpoint.figures.get("is_completed", False))


def _tensor_key(number: int) -> str:
    """Key of the sums of input `number` in a checkpoint, whatever the statistics. Unfinished runs have this name."""
    return f"hessian.{number}"


def collect(
    context: BlockContext,
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    biased: Samples,
    kind: type[Statistics],
    counter: Counter,
) -> LayerInputs:
    """Collect statistics over the inputs of every layer; resumes from a checkpoint.

    A forward pass ends as soon as the last layer has received its input.

    Args:
        context: The block and its samples.
        block: Unpruned, on the device.
        modules: The layers to prune, by their path in the block.
        biased: The block's input of each of N samples, (T, H).
        kind: The class of statistics that the pruner needs.
        counter: Reports the samples that are done.

    Raises:
        AssertionError: A layer that is no expert's never received an input, or a layer shared its input in one
            micro-batch and not in another.
    """
    device = context.device.torch_device
    collected = LayerInputs.restored(context.callbacks.restore(), kind, device)
    recorder = _InputRecorder(collected, kind)
    handles = [
        module.register_forward_pre_hook(recorder.hook(path, context.model.weight_matrix(module).shape[1]))
        for path, module in modules.items()
    ]
    counter.advance(collected.num_samples)
    runner = context.runner(block)
    batches = runner.batches(range(collected.num_samples, len(context.inputs)))
    try:
        with runner.reading(batches, biased) as read:
            for batch in read:
                context.callbacks.checkpoint(collected.checkpoint)
                recorder.missing.update(modules)
                with contextlib.suppress(_AllSeen):
                    runner.forward(batch.samples[0], batch.call)
                recorder.seen.clear()
                collected.num_samples += len(batch.numbers)
                counter.advance(len(batch.numbers))
    finally:
        for handle in handles:
            handle.remove()
    of_experts = {info.path for info in context.model.layers(context.index) if info.peers is not None}
    unread = [path for path in modules if path not in recorder.assigned and path not in of_experts]
    if unread:
        raise AssertionError(f"{context.name}: no input ever reached {', '.join(unread)}")
    return collected


class _AllSeen(Exception):
    """Ends a forward pass when every layer has received its input."""


class _InputRecorder:
    """Adds each distinct input to its statistics, once per micro-batch."""

    def __init__(self, collected: LayerInputs, kind: type[Statistics]) -> None:
        self.collected, self.kind = collected, kind
        self.assigned = collected.by_path
        self.seen: dict[int, tuple[Tensor, LayerInput]] = {}  # in this micro-batch; the tensor is kept alive
        self.missing: set[str] = set()  # layers without an input in this micro-batch

    def hook(self, path: str, cols: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook for the layer at `path`, which has `cols` input channels."""

        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            _, found = self.seen.get(id(x), (None, None))
            is_first_reader = found is None
            if found is None:
                found = self.assigned.get(path)
            if found is None:
                found = LayerInput(self.kind(cols, x.device))
                self.collected.inputs.append(found)
            if self.assigned.setdefault(path, found) is not found:
                raise AssertionError(f"{path} shared its input with other layers in one batch but not in another")
            if path not in found.paths:
                found.paths.append(path)
            if is_first_reader:
                self.seen[id(x)] = (x, found)
                tokens = x.reshape(-1, cols)
                found.statistics.add(tokens)
                found.num_tokens += len(tokens)
            self.missing.discard(path)
            if not self.missing:
                raise _AllSeen

        return record
