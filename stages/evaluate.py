"""The stage that measures a model: one metric on one data source, with one block in memory at a time."""

from __future__ import annotations

from stages.data.base import DataSource
from stages.errors import UsageError
from stages.metrics.base import EvaluationProtocol, Measurement, Metric, MetricContext
from stages.metrics.registry import METRICS
from stages.models.base import BlockModel
from stages.tasks.registry import model_for, require_readable, task_named


def metric_for(model_task: str, name: str | None = None) -> Metric:
    """The metric of this name, or the usual one of a kind of model.

    Raises:
        UsageError: There is none, or it measures another kind of model.
    """
    found = METRICS.get(name or task_named(model_task).metric)
    if found.task != model_task:
        raise UsageError(f"the metric {found.name} measures {model_for(found.task)}; this is {model_for(model_task)}")
    return found()


def require_measurable(
    model: BlockModel, source: DataSource, protocol: EvaluationProtocol, metric: str | None = None
) -> None:
    """Check beforehand that the model can be measured on a source. Downloads nothing.

    Raises:
        UsageError: It cannot be, with the remedy.
    """
    found = metric_for(model.task, metric)
    require_readable(source, model)
    source.check()
    found.require_measurable(model, source, protocol)


def evaluate(context: MetricContext, metric: str | None = None) -> Measurement:
    """Measure a model.

    Args:
        context: The model, the data source, the protocol and what the work needs.
        metric: Name of the metric; None: the usual one of this kind of model.

    Raises:
        UsageError: The data are of no use for this model, or the metric's package is broken.
        ResourceError: The data are out of reach.
    """
    name = metric or task_named(context.model.task).metric
    found = metric_for(context.model.task, name)
    require_readable(context.source, context.model)
    measured = found.measure(context)
    try:
        _require_valid(measured, name, found, context.source)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the metric {name} is broken ({error}): update its package, or leave it out of --metrics"
        ) from error
    return measured


def _require_valid(measured: object, name: str, metric: Metric, source: DataSource) -> None:
    """Raise ValueError or TypeError for what no commit may hold: a class of another package may return anything."""
    if not isinstance(measured, Measurement):
        raise TypeError(f"it returned a {type(measured).__name__}, no Measurement")
    if (measured.metric, measured.source) != (name, source.name):
        raise ValueError(f"it returned a measurement of {measured.metric} on {measured.source}, not on {source.name}")
    metric.require_possible(measured.value)
    if not isinstance(measured.details, metric.details):
        raise TypeError(f"its details are of {type(measured.details).__name__}, not of {metric.details.__name__}")
    metric.details.from_json(measured.details.as_json())
