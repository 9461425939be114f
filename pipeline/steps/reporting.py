"""What the result of a step adds to progress, status, tables and figures, in one form for every kind of step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.steps.results import FinishedRecord, TrainingRecord


def counted(number: int, noun: str) -> str:
    """For people: "1 sample", "1,024 samples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class BlockTraining:
    """One training of a block.

    Attributes:
        name: Its name in tables and figures, for example ``compensation``.
        record: How it went.
    """

    name: str
    record: TrainingRecord

    @property
    def headline(self) -> str:
        """The loss before and after, on the held-out samples where there are any."""
        from pipeline.steps.results import judged

        first, last = judged(self.record.before, self.record.after)
        if not self.record.epoch_losses:
            return f"loss {_loss(first)}, not trained"
        if not self.record.kept_epoch:
            return f"loss {_loss(first)} (no epoch improved it; kept the weights from before)"
        return f"loss {_loss(first)} -> {_loss(last)}"


@dataclass(frozen=True)
class BlockReport:
    """What a step says of its block. The status of a block puts the reports of its steps together.

    Attributes:
        state: What the block is once the step is done, for example ``pruned``.
        training: The training that the step did; None: it trained nothing.
        relative_errors: By layer, what the step did to the layer's output; None: it overflowed.
        finished: Weights of the block as they are exported; None: a later step finishes it.
    """

    state: str
    training: BlockTraining | None = None
    relative_errors: Mapping[str, float | None] = field(default_factory=dict)
    finished: FinishedRecord | None = None


@dataclass(frozen=True)
class Series:
    """A curve that the report draws.

    Attributes:
        title: Title of the figure. Curves of the same title share it.
        x_title: Title of the x axis.
        y_title: Title of the y axis.
        points: (x, y) in the order of the curve. None: no value.
    """

    title: str
    x_title: str
    y_title: str
    points: tuple[tuple[float, float | None], ...]


def _loss(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
