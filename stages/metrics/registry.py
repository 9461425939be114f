"""The metrics by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stages.errors import UsageError
from stages.registry import Registry

if TYPE_CHECKING:
    from stages.metrics.base import Metric

METRICS: Registry[type[Metric]] = Registry(
    "metric",
    {
        "perplexity": "stages.metrics.perplexity:Perplexity",
        "iou": "stages.metrics.iou:SinglePointIoU",
        "feature_cosine": "stages.metrics.feature_cosine:FeatureCosine",
    },
    base="stages.metrics.base:Metric",
)


def metric_of(name: str) -> type[Metric]:
    """The metric of a recorded result; one whose package is gone keeps its plain name."""
    try:
        return METRICS.get(name)
    except UsageError:
        from stages.metrics.base import UnknownMetric

        return type("UnknownMetric", (UnknownMetric,), {"name": name, "title": name})


def figure_text(metric: str, value: float | None) -> str:
    """A value as people see it everywhere; "-" where there is none, "infinite" where it overflowed."""
    return metric_of(metric).text(value)


def recorded_text(metric: str, value: float | None) -> str:
    """A recorded value, which is None where it overflowed, as people see it everywhere."""
    return figure_text(metric, math.inf if value is None else value)
