"""Streams, scratch space and callbacks in memory: the Protocols of `stages.interfaces` without a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stages.interfaces import Checkpoint, Watcher


class ListStream:
    """A `Stream` in memory."""

    def __init__(self, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._sample_shape = sample_shape
        self._dtype = dtype
        self._samples: list[Tensor | None] = [None] * num_samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Tensor:
        sample = self._samples[index]
        if sample is None:
            raise KeyError(f"sample {index} was never written")
        return sample.clone()

    def write(self, index: int, sample: Tensor, /) -> None:
        if tuple(sample.shape) != self._sample_shape:
            raise ValueError(f"sample {index} is {tuple(sample.shape)}, the stream holds {self._sample_shape}")
        self._samples[index] = sample.detach().to("cpu", self._dtype, copy=True)


class ListScratch:
    """A `Scratch` in memory."""

    def stream(self, name: str, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> ListStream:
        return ListStream(num_samples, sample_shape, dtype)


class WithoutCheckpoints:
    """`Callbacks` of work that keeps no checkpoint: stopped, it begins at the beginning. A watcher gets the rest."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        self._watcher.report(done, total, unit, **metrics)

    def restore(self) -> Checkpoint | None:
        """Return None: there is no checkpoint."""
        return None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        self._watcher.check_stop()

    def checkpoint_now(self, make: Callable[[], Checkpoint]) -> None:
        self._watcher.check_stop()

    def check_stop(self) -> None:
        self._watcher.check_stop()

    def warn(self, message: str) -> None:
        self._watcher.warn(message)


class KeepingParts(WithoutCheckpoints):
    """`DurableCallbacks` that keep parts in memory, and no checkpoint."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(watcher)
        self._parts: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._parts[name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}

    def kept(self, name: str) -> Mapping[str, Tensor]:
        return self._parts[name]


class NullCallbacks:
    """`Callbacks` that show no progress, never stop, keep no checkpoint, and collect the warnings in a list."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        """Do nothing."""

    def restore(self) -> Checkpoint | None:
        """Return None: there is no checkpoint."""
        return None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """Do nothing."""

    def checkpoint_now(self, make: Callable[[], Checkpoint]) -> None:
        """Do nothing."""

    def check_stop(self) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        self.warnings.append(message)
