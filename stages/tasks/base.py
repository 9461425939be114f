"""Task: one modality. It says where calibration samples come from, how models are measured and how they are loaded.

A model names its task (`BlockModel.task`); pipeline and command line ask the task object and know no modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from stages.data.base import DataSource
    from stages.data.drawing import Drawing
    from stages.interfaces import Samples, Watcher
    from stages.metrics.points import Points
    from stages.models.base import BlockModel
    from stages.training.end_loss import EndLoss


@dataclass(frozen=True)
class Drawn:
    """A calibration set, sample by sample, and what is to be said of it in the commit."""

    samples: Samples
    amount: int  # of data, in `unit`
    unit: str  # "tokens", "images"
    skipped: Mapping[str, int] = field(default_factory=dict)  # samples that could not be used, by reason


class Task(Protocol):
    """One modality of models."""

    name: str  # in `stages.tasks.registry.TASKS`
    title: str  # for people
    help: str  # one line
    contents: str  # what its data sources hold: "text", "images"
    reads_text: bool  # whether prompts, windows of tokens and zero-shot tasks apply to its models
    loader: str  # class that opens an exported folder by `from_pretrained`
    loader_dtype: str  # the `dtype` for it
    loading: tuple[str, ...]  # lines of Python that open an exported folder "PATH/TO/THIS/FOLDER"
    metric: str  # of its usual evaluation, a name of `stages.metrics.registry.METRICS`
    end_loss: type[EndLoss]  # of the pruned model's output against the dense model's
    default_calibration: str | None  # None: the user must name one
    default_evaluation: tuple[str, ...]
    default_points: Points | None  # None: there are none
    missing_calibration: str  # what to say then
    missing_evaluation: str | None  # what to say where nothing would be measured

    def default_sampling(self, calibration: str) -> str:
        """How samples are drawn from a source unless the user says."""
        ...

    def require_samples(self, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
        """Raise UsageError, with the numbers, where a local source is too small or no use for this model."""
        ...

    def draw(self, model: BlockModel, source: DataSource, drawing: Drawing, watcher: Watcher) -> Drawn:
        """The calibration set. watcher: shows progress, and may stop the work."""
        ...


class Listed:
    """Samples that are in memory already."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._samples[index]
