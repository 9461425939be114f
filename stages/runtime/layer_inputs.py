"""The distinct inputs of a block's layers, and statistics over them, collected in passes over the stream.

Layers that read the same tensor (q, k and v; gate and up) have one distinct input, and share its statistics.

N: samples.    T: tokens of a sample.    H: hidden size.    C: input channels of a layer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.interfaces import Samples
from stages.models.base import LayerInfo
from stages.pruners.base import Statistics
from stages.runtime.block_context import BlockContext


@dataclass(frozen=True)
class DistinctInput:
    """A distinct input of a block, and the layers that read it."""

    paths: tuple[str, ...]  # of the layers, in the block
    cols: int  # C
    peers: tuple[str, ...] = ()  # the same layers of all experts, one name each; (): no expert's
    digest: str | None = None  # of its values in the first micro-batch; None: not computed, or it had none there

    @property
    def place(self) -> tuple[str, ...]:
        """The same for the inputs of all experts at one place: those of gate and up, or those of down."""
        return self.peers or self.paths

    @property
    def is_shared(self) -> bool:
        """Whether several layers read this input."""
        return len(self.paths) > 1


@dataclass(eq=False)
class LayerInput:
    """A distinct input and its statistics."""

    source: DistinctInput
    statistics: Statistics


class PassProgress(Protocol):
    """Progress of a pass over the samples."""

    @property
    def num_samples(self) -> int:
        """Samples that the statistics hold already."""
        ...

    def boundary(self) -> None:
        """Stop here if requested, and keep a checkpoint. Called before each micro-batch."""
        ...

    def collected(self, count: int) -> None:
        """The statistics hold `count` more samples."""
        ...


@torch.no_grad()
def find_inputs(
    context: BlockContext, block: nn.Module, modules: Mapping[str, nn.Module], biased: Samples, *, with_digests: bool
) -> list[DistinctInput]:
    """The distinct inputs of a block, in the order in which a forward pass computes them.

    Inputs of experts are ordered by place: the inputs of gate and up of all experts, then those of down. Runs the
    first micro-batch, and further ones only until every layer, or its peer in another expert, has received an input.

    Args:
        context: The block and its samples.
        block: Unpruned, on the device.
        modules: The layers to prune, by their path in the block.
        biased: The block's input of each of N samples, (T, H).
        with_digests: `collect` will compare the values of the first micro-batch.

    Raises:
        AssertionError: A layer that is no expert's never received an input.
    """
    order = _ForwardOrder([info for info in context.model.layers(context.index) if info.path in modules])
    runner = context.runner(block)
    batches = runner.batches(range(len(context.inputs)))
    with runner.reading(batches, biased) as read:
        for batch in read:
            seen = _Seen()
            with _hooked(modules, seen.record):
                runner.forward(batch.samples[0], batch.call)
            order.add(seen.paths.values())
            if with_digests and batch.numbers[0] == 0:
                for key, (path, *_) in seen.paths.items():
                    order.digests.setdefault(path, _digest(seen.tensors[key]))
            del batch, seen
            if not order.missing:
                break
    unread = [path for path in order.missing if order.infos[path].peers is None]
    if unread:
        raise AssertionError(f"{context.name}: no input ever reached {', '.join(unread)}")
    return order.inputs()


def collect(
    context: BlockContext,
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    biased: Samples,
    inputs: Sequence[LayerInput],
    received: dict[DistinctInput, int],
    progress: PassProgress,
) -> None:
    """Add the samples that are left of a pass over the stream to the statistics of `inputs`.

    A forward pass ends as soon as the last layer of these has received its input.

    Args:
        context: The block and its samples.
        block: On the device. Layers that a forward pass reaches before those of `inputs` are unpruned.
        modules: The layers to prune, by their path in the block.
        biased: The block's input of each of N samples, (T, H).
        inputs: What is collected.
        received: The tokens of these inputs are counted; empty: none are.
        progress: Knows how many samples the statistics hold already, and counts on.

    Raises:
        AssertionError: A layer shared its input in one micro-batch and not in another, or the digest of an input says
            that its values have changed since `find_inputs`.
    """
    runner = context.runner(block)
    batches = runner.batches(range(progress.num_samples, len(context.inputs)))
    recorder = _InputRecorder(inputs, received)
    with (
        _hooked({path: modules[path] for path in recorder.paths}, recorder.record),
        runner.reading(batches, biased) as read,
    ):
        for batch in read:
            progress.boundary()
            with recorder.micro_batch(is_first=batch.numbers[0] == 0):
                runner.forward(batch.samples[0], batch.call)
            progress.collected(len(batch.numbers))


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which `record` gets the path and the input of each of the layers, whenever it is called."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: record(path, args[0])

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digest(x: Tensor) -> str:
    data = x.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


class _Seen:
    """The layers that a forward pass reached, by the tensor that they read, in the order of the calls."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}  # kept alive, so that no other gets the same id
        self.paths: dict[int, list[str]] = {}

    def record(self, path: str, x: Tensor) -> None:
        self.tensors.setdefault(id(x), x)
        self.paths.setdefault(id(x), []).append(path)


class _ForwardOrder:
    """The order in which forward passes reached the distinct inputs."""

    def __init__(self, infos: Iterable[LayerInfo]) -> None:
        self.infos = {info.path: info for info in infos}
        self.digests: dict[str, str] = {}  # by the first layer that read the input
        self._places: list[tuple[str, ...]] = []
        self._known: dict[str, tuple[str, ...]] = {}  # the layers that share the input, by each of their paths
        self._peers: dict[str, tuple[str, ...]] = {}  # the peers that share an input, by each of their names

    @property
    def missing(self) -> list[str]:
        """Layers that received no input, neither themselves nor, of experts, as a peer in another expert."""
        known, peers = self._known, self._peers
        return [path for path, info in self.infos.items() if path not in known and info.peers not in peers]

    def add(self, groups: Iterable[Sequence[str]]) -> None:
        """Add the layers that one forward pass reached: in the order of its calls, those with one input together."""
        position = 0
        for group in groups:
            paths = tuple(path for path in self.infos if path in group)
            for path in paths:
                if self._known.setdefault(path, paths) != paths:
                    raise _unequal(path)
            place = self._place(paths)
            if place not in self._places:
                self._places.insert(position, place)
            position = self._places.index(place) + 1

    def inputs(self) -> list[DistinctInput]:
        """The inputs, in order. Experts that received no token share inputs as the others do."""
        together: dict[tuple[str, ...], list[str]] = {}
        for path, info in self.infos.items():
            if path not in self._known:
                peers = self._peers.setdefault(str(info.peers), (str(info.peers),))
                together.setdefault((str(info.expert), *peers), []).append(path)
        distinct = {*self._known.values(), *map(tuple, together.values())}
        found: dict[tuple[str, ...], list[DistinctInput]] = {place: [] for place in self._places}
        first_of = {path: number for number, path in enumerate(self.infos)}
        for paths in sorted(distinct, key=lambda paths: first_of[paths[0]]):
            digest = next((self.digests[path] for path in paths if path in self.digests), None)
            one = DistinctInput(paths, self.infos[paths[0]].cols, self._peers_of(paths), digest)
            found.setdefault(one.place, []).append(one)
        return [one for place in found.values() for one in place]

    def _place(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        peers = self._peers_of(paths)
        for name in peers:
            if self._peers.setdefault(name, peers) != peers:
                raise AssertionError(f"{paths[0]} shared its input with other layers than its peers in other experts")
        return peers or paths

    def _peers_of(self, paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({str(self.infos[path].peers) for path in paths if self.infos[path].peers is not None}))


def _unequal(path: str) -> AssertionError:
    return AssertionError(f"{path} shared its input with other layers in one batch but not in another")


class _AllSeen(Exception):
    """Ends a forward pass when every layer has received its input."""


class _InputRecorder:
    """Adds each distinct input to its statistics, once per micro-batch."""

    def __init__(self, inputs: Iterable[LayerInput], received: dict[DistinctInput, int]) -> None:
        self._found = {path: found for found in inputs for path in found.source.paths}
        self._received = received
        self._counted = {source.paths[0]: source for source in received}
        self.paths = {*self._found, *self._counted}  # the layers whose inputs are needed
        self._seen: dict[int, tuple[Tensor, LayerInput]] = {}  # in this micro-batch; the tensors are kept alive
        self._missing: set[str] = set()  # layers without an input in this micro-batch
        self._to_compare: set[str] = set()  # layers whose next input must have the digest

    @contextlib.contextmanager
    def micro_batch(self, *, is_first: bool) -> Iterator[None]:
        """Context of the forward pass of a micro-batch. is_first: the one of which the digests are."""
        self._missing.update(self.paths)
        self._to_compare = {path for path, found in self._found.items() if is_first and found.source.digest is not None}
        with contextlib.suppress(_AllSeen):
            yield
        self._seen.clear()

    def record(self, path: str, x: Tensor) -> None:
        """A layer is called with the input `x`."""
        if path in self._counted:
            source = self._counted[path]
            self._received[source] += x.numel() // source.cols
        if path in self._found:
            self._add(path, x)
        self._missing.discard(path)
        if not self._missing:
            raise _AllSeen

    def _add(self, path: str, x: Tensor) -> None:
        found = self._found[path]
        if id(x) not in self._seen:
            if path in self._missing and not self._missing.issuperset(found.source.paths):
                raise _unequal(path)
            self._seen[id(x)] = (x, found)
            if path in self._to_compare and _digest(x) != found.source.digest:
                raise AssertionError(f"the input of {path} has changed between two passes")
            self._to_compare.difference_update(found.source.paths)
            found.statistics.add(x.reshape(-1, found.source.cols))
        elif self._seen[id(x)][1] is not found:
            raise _unequal(path)
