"""What a stage needs from outside, as three small Protocols. `stages.in_memory` has a version of each on lists.

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


class Callbacks(Watcher, Protocol):
    """How a stage speaks with whoever runs it."""

    def restore(self) -> Checkpoint | None:
        """Where an earlier attempt at this step was when it last kept a checkpoint; None: begin at the beginning."""
        ...

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """As `check_stop`, at a place from which the stage could go on: keeps what `make` gives, if it is time to."""
        ...
