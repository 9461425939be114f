"""The stage that measures a model: one metric on one data source, with one block in memory at a time."""

from __future__ import annotations

from stages.data.base import DataSource
from stages.metrics.base import EvaluationProtocol, Measurement, Metric, MetricContext
from stages.metrics.registry import METRICS
from stages.models.base import BlockModel
from stages.tasks.registry import require_readable, task_named


def metric_for(model_task: str, name: str | None = None) -> Metric:
    """The metric of this name, or the usual one of a kind of model.

    Raises:
        UsageError: There is none, or it measures another kind of model.
    """
    from stages.errors import UsageError

    found = METRICS.get(name or task_named(model_task).metric)
    if found.task != model_task:
        raise UsageError(f"the metric {found.name} measures {found.task} models; this is a {model_task} model")
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
        UsageError: The data are of no use for this model.
        ResourceError: The data are out of reach.
    """
    found = metric_for(context.model.task, metric)
    require_readable(context.source, context.model)
    return found.measure(context)
