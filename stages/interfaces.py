"""Protocols of what a stage needs from outside: streams of samples, scratch space and callbacks.

A stage does not know whether its activations are stored in a list, on a disk or in a bucket, what shows its progress,
or why it has to stop. `stages.in_memory` implements each Protocol in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

# Commands such as `lampctl status` import this module and must not wait a second for torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Samples(Protocol):
    """A fixed number of samples, read one at a time, from any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """Return sample `index` on the CPU, bit-identical to what was written. The caller may change it."""
        ...


class Stream(Samples, Protocol):
    """A fixed number of activation samples, each (tokens, hidden), read and written one at a time."""

    def write(self, index: int, sample: Tensor, /) -> None:
        """Store sample `index`, converted to the stream's own dtype."""
        ...


class Scratch(Protocol):
    """Space for intermediate results, which are deleted when the stage ends."""

    def stream(self, name: str, num_samples: int, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Stream:
        """Create an empty stream."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """State of a stage at a batch boundary: enough to resume there and give bit-identical results."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)  # JSON values; floats are restored exactly
    parts: Collection[str] = ()  # names of what `Callbacks.keep` stored that the state needs, too


class Watcher(Protocol):
    """Callbacks of work without checkpoints."""

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        """Report progress: `done` of `total` units, with metrics to show, such as a loss."""
        ...

    def check_stop(self) -> None:
        """Raise if the work should stop here. Called at every batch boundary."""
        ...

    def warn(self, message: str) -> None:
        """Show a message to the user. The work continues."""
        ...


class Callbacks(Watcher, Protocol):
    """Callbacks of a stage that can be stopped and resumed."""

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint of an earlier attempt at this step; None: start from the beginning."""
        ...

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        """As `check_stop`, where the stage can resume. Calls `make` and stores its checkpoint if one is due."""
        ...

    def checkpoint_now(self, make: Callable[[], Checkpoint]) -> None:
        """As `checkpoint`, for one that is small for the time it saves, or is of parts stored already: always due."""
        ...


class DurableCallbacks(Callbacks, Protocol):
    """Callbacks of a stage whose state is too large for one checkpoint: it is stored in parts, one per block."""

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a part durably, for checkpoints that name it, in place of an earlier part of that name.

        A checkpoint keeps the part that had the name when the checkpoint was made.
        """
        ...

    def kept(self, name: str) -> Mapping[str, Tensor]:
        """The newest part of this name, or the one of the restored checkpoint; each tensor is read when asked for."""
        ...
