"""In-memory streams, scratch space and callbacks: what a stage needs from outside, without a disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.interfaces import Checkpoint


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


class NullCallbacks:
    """`Callbacks` that tell nobody, never stop, and keep the warnings for whoever asks."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Nobody listens."""

    def restore(self) -> Checkpoint | None:
        """Nobody has been here before."""
        return None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """Nothing is kept."""

    def check_stop(self) -> None:
        """Nobody asks to stop."""

    def warn(self, message: str) -> None:
        self.warnings.append(message)
