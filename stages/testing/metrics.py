"""Conformance kit for metrics: `check_metric` raises AssertionError with the promise that a metric breaks."""

from __future__ import annotations

import json
import math

from stages.metrics.base import Measurement, Metric, MetricContext


def check_metric(metric: type[Metric], context: MetricContext) -> Measurement:
    """Check a metric on a small model and data source, and return what it measured.

    It must describe itself, measure the same at every call, return a possible value and details of the class that it
    names, and say of a partial result that it is one.

    Args:
        metric: The metric.
        context: A model of the metric's task, and a data source for it.

    Raises:
        AssertionError: A promise is broken; the message says which.
    """
    for attribute in ("name", "title", "help", "task"):
        value = getattr(metric, attribute, None)
        assert isinstance(value, str), f"{metric.__name__}.{attribute} is missing"
        assert value, f"{metric.__name__}.{attribute} is empty"
    assert "\n" not in metric.help, f"{metric.__name__}.help is more than one line"
    assert isinstance(metric.digits, int), f"{metric.__name__}.digits is not a whole number"
    assert isinstance(metric.higher_is_better, bool), f"{metric.__name__}.higher_is_better is not a bool"
    assert metric.task == context.model.task, f"{metric.name} measures {metric.task} models"
    metric().require_measurable(context.model, context.source, context.protocol)
    first, second = metric().measure(context), metric().measure(context)
    assert first == second, f"{metric.name} measures {first.value} and then {second.value}"
    assert first.metric == metric.name, f"{metric.name} calls its value {first.metric}"
    assert first.source == context.source.name, f"{metric.name} names the source {first.source}"
    assert isinstance(first.value, float), f"{metric.name} gives {first.value!r}, not a float"
    metric.require_possible(first.value)
    assert type(first.details) is metric.details, f"{metric.name} has details of another class than it names"
    stored = json.loads(json.dumps(first.details.as_json(), allow_nan=False))
    assert metric.details.from_json(stored) == first.details, f"{metric.name} reads other details than it wrote"
    partial = first.details.described(is_partial=True)
    assert "partial" in partial, f"{metric.name} does not say that a result is partial: {partial!r}"
    assert metric.text(None) == "-", f"{metric.name} has no text for a missing value"
    assert metric.text(math.inf) == "infinite", f"{metric.name} has no text for infinity"
    return first
