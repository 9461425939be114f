"""What a stage needs from outside, as three small Protocols, with in-memory versions of each.

A stage never knows whether its activations lie in a list, on a disk or in a bucket, who watches its
progress, or why it is asked to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

# Whoever only asks how far a run is needs none of its second of import.
if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Samples(Protocol):
    """A fixed number of samples, read one at a time, from any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """Sample `index` on the CPU, as it was written, bit for bit. The caller may change it."""
        ...


class Stream(Samples, Protocol):
    """A fixed number of activation samples, each (tokens, hidden), read and written one at a time."""

    def write(self, index: int, sample: Tensor, /) -> None:
        """Store sample `index`, converted to the stream's own dtype."""
        ...


class Scratch(Protocol):
    """Gives a stage room for intermediate results, which are gone when the stage ends."""

    def stream(self, name: str, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Stream: ...


@dataclass(frozen=True)
class Checkpoint:
    """Where a stage is inside its work: enough to go on from there and give the same bits."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)  # JSON: a float comes back as it was, to the last bit


class Watcher(Protocol):
    """Who watches work that is done in one go."""

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Tell how far the work is (`done` of `total` units), with figures worth showing, such as a loss."""
        ...

    def check_stop(self) -> None:
        """Raise, if the work should stop here. Called at every batch boundary."""
        ...

    def warn(self, message: str) -> None:
        """Pass on something that the user should read but that does not stop the work."""
        ...


class Hooks(Watcher, Protocol):
    """How a stage speaks with whoever runs it."""

    def restore(self) -> Checkpoint | None:
        """Where an earlier attempt at this step was when it last kept a checkpoint; None: begin at the beginning."""
        ...

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """As `check_stop`, at a place from which the stage could go on: keeps what `make` gives, if it is time to."""
        ...


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


class NullHooks:
    """`Hooks` that tell nobody, never stop, and keep the warnings for whoever asks."""

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
