"""What a metric is: one class that measures a model on a data source, and says how its value is written.

To add one, write a subclass of `Metric` in one file and name it in `stages.metrics.registry`, or in an entry point of
the group ``lampctl.metrics`` of another package. `stages.testing.metrics.check_metric` tests it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from stages.metrics.details import Details, OpenDetails

if TYPE_CHECKING:
    from pydantic import JsonValue

    from stages.data.base import DataSource
    from stages.data.chat import ChatTemplate
    from stages.data.text_source import Bos
    from stages.interfaces import Callbacks, Scratch
    from stages.machine.device import DeviceChoices
    from stages.metrics.points import Points
    from stages.models.base import BlockModel


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a model is measured: a runtime choice, which changes no weight."""

    seqlen: int  # language: tokens of a window
    max_tokens: int | None = None
    points: Points | None = None  # vision: where in each segmentation mask the point is
    max_images: int | None = None
    # Language: where BOS stands. Not in the label: all evaluations of a run have the same.
    bos: Bos = "stream"
    chat_template: ChatTemplate = "auto"  # how conversations become text; the same holds for it

    @property
    def label(self) -> str:
        """As short as names of steps want it: two protocols with one label are the same."""
        limit = self.max_images if self.max_tokens is None else self.max_tokens
        return f"{self.points or self.seqlen}{f':{limit}' if limit is not None else ''}"


@dataclass(frozen=True)
class MetricContext:
    """A model to measure, and what the work needs."""

    model: BlockModel
    original: BlockModel  # has the tokenizer
    source: DataSource
    protocol: EvaluationProtocol
    scratch: Scratch
    device: DeviceChoices
    callbacks: Callbacks


@dataclass(frozen=True)
class Measurement:
    """The value of a metric on a data source."""

    metric: str  # its name in the registry
    value: float  # infinite where it overflowed
    source: str  # name of the data source
    is_partial: bool  # a limit left data out that the field would measure on
    details: Details = field(default_factory=OpenDetails)  # of the class that the metric names

    def record(self) -> dict[str, JsonValue]:
        """All of it in one dictionary, the value under the metric's name, for printed JSON. Infinity is null."""
        value = self.value if math.isfinite(self.value) else None
        return {
            "source": self.source,
            "metric": self.metric,
            self.metric: value,
            **self.details.as_json(),
            "is_partial": self.is_partial,
        }


class Metric(ABC):
    """Base of all metrics. Class attributes describe it."""

    name: ClassVar[str]  # in `--metrics`, commits and JSON
    title: ClassVar[str]  # in tables and reports
    help: ClassVar[str]  # one line
    task: ClassVar[str]  # the kind of model that it measures: a name of `stages.tasks.registry`
    digits: ClassVar[int]  # after the point
    higher_is_better: ClassVar[bool]
    least: ClassVar[float] = -math.inf  # the smallest and the largest value that it can have
    most: ClassVar[float] = math.inf
    details: ClassVar[type[Details]] = OpenDetails  # what its measurements say beside the value

    def require_measurable(self, model: BlockModel, source: DataSource, protocol: EvaluationProtocol) -> None:
        """Check beforehand what can be checked without computing.

        Raises:
            UsageError: A local source cannot be measured on, with the remedy.
        """
        return

    @abstractmethod
    def measure(self, context: MetricContext) -> Measurement:
        """Measure a model, with one block in memory at a time. Stopped, it resumes from its last checkpoint."""

    @classmethod
    def text(cls, value: float | None) -> str:
        """A value as people see it everywhere; "-" where there is none, "infinite" where it overflowed."""
        if value is None:
            return "-"
        return f"{value:,.{cls.digits}f}" if math.isfinite(value) else "infinite"

    @classmethod
    def require_possible(cls, value: float | None) -> None:
        """Raise ValueError for a value that the metric cannot have. None: it overflowed."""
        if value is not None and not cls.least <= value <= cls.most:
            raise ValueError(f"{cls.name} is {value}; it must lie in [{cls.least:g}, {cls.most:g}]")


class UnknownMetric(Metric):
    """Stands for a metric whose package is gone, so that its runs can still be shown."""

    title, help, task = "?", "A metric of a package that is not installed.", "?"
    digits, higher_is_better = 4, True

    def measure(self, context: MetricContext) -> Measurement:
        raise NotImplementedError(self.help)
