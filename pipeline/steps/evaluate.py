"""Step: measure the exported model, or the original one, on one data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config.settings import flag_of
from pipeline.engine.plan import Step
from pipeline.errors import ConfigMismatch
from pipeline.steps.bos_choice import bos_for
from pipeline.steps.committed import measurements_of
from pipeline.steps.model_measurement import ModelMeasurement, measured_models
from pipeline.steps.results import EvaluateResult, Which
from pipeline.steps.run_facts import facts_of
from stages.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.rundir.records import JsonObject
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.data.base import DataSource
    from stages.interfaces import Callbacks
    from stages.metrics.base import EvaluationProtocol, Measurement

# Number of tokens in the test set of WikiText-2. The length of another text is known only when it is evaluated.
_USUAL_EVALUATION_TOKENS = 350_000


@dataclass(frozen=True)
class Evaluation:
    """What one evaluate step measures.

    Attributes:
        which: "dense" (the original model) or "pruned".
        source: Name of the data source.
        protocol: How to measure.
        metric: Name of the metric; None: the usual one of this kind of model.
    """

    which: Which
    source: str
    protocol: EvaluationProtocol
    metric: str | None = None

    @property
    def subject(self) -> str:
        """The part of the step's name after ``evaluate/``. Two evaluations with the same subject are the same."""
        metric = f":{self.metric}" if self.metric is not None else ""
        return f"{self.which}/{self.source}@{self.protocol.label}{metric}"


class Evaluate(ModelMeasurement[EvaluateResult]):
    """Measures a model on one data set, block by block over scratch streams; writes no payload."""

    result = EvaluateResult
    name = "evaluate"
    title = "evaluate"
    help = "Measure the pruned model, or the original one, on one data set."

    @classmethod
    def after_export(cls, config: RunConfig) -> Iterable[Step]:
        """One step for each data set and metric."""
        return evaluation_steps(config.evaluate, config.evaluation_protocol, config.evaluate_dense, config.metrics)

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> EvaluateResult:
        from stages.data.registry import parse_source
        from stages.evaluate import evaluate, metric_for
        from stages.metrics.base import MetricContext
        from stages.models.registry import open_model

        what = step.request
        assert isinstance(what, Evaluation)
        model = context.model if what.which == "dense" else open_model(context.exported_folder())
        with naming_remedy("evaluate", context.run.label):
            source = parse_source(what.source)
        with naming_remedy("metrics", context.run.label):
            metric_for(model.task, what.metric)
        _require_same_data(context, source)
        protocol, chosen = what.protocol, None
        if context.task.reads_text:
            chosen = bos_for(context, source, protocol, "evaluation", attempt, callbacks)
            protocol = replace(protocol, bos=chosen.mode)
        measuring = MetricContext(model, context.model, source, protocol, attempt.scratch(), context.choices, callbacks)
        result = evaluate_result(what.which, source.digest(), evaluate(measuring, what.metric))
        return result.model_copy(update={"bos": chosen})

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        what = step.request
        assert isinstance(what, Evaluation)
        return context.activation_bytes(what.protocol.max_tokens or _USUAL_EVALUATION_TOKENS)

    @classmethod
    def headline(cls, result: EvaluateResult) -> str:
        from stages.metrics.registry import metric_of, recorded_text

        partial = " (partial)" if result.is_partial else ""
        shown = recorded_text(result.metric, result.value)
        return f"{metric_of(result.metric).title} {shown}{partial}"

    @classmethod
    def measurement(cls, result: EvaluateResult) -> EvaluateResult:
        return result


@contextlib.contextmanager
def naming_remedy(field: str, run: str) -> Iterator[None]:
    """Inside, an error about a recorded setting also says how to go on without its value.

    The package of a metric or of a data source may be uninstalled after the run began.

    Args:
        field: Name of the setting.
        run: Label of the run.
    """
    try:
        yield
    except UsageError as error:
        flag = flag_of(field)
        raise UsageError(
            f"{error}; {run} has recorded this value: install the package that provides it, or give other values, or "
            f"none: lampctl evaluate {run} {flag} ''"
        ) from error


def evaluation_steps(
    sources: Iterable[str], protocol: EvaluationProtocol, with_dense: bool, metrics: Sequence[str] = ()
) -> tuple[Step, ...]:
    """The evaluate steps of these data sources, none twice. metrics: beside the usual one."""
    return Evaluate.steps(
        Evaluation(which, source, protocol, metric)
        for source in sources
        for metric in (None, *metrics)
        for which in measured_models(with_dense)
    )


def evaluate_result(which: Which, digest: JsonObject | None, measured: Measurement) -> EvaluateResult:
    """The record of a measurement."""
    return EvaluateResult(
        which=which,
        source=measured.source,
        source_digest=digest,
        metric=measured.metric,
        value=measured.value,
        is_partial=measured.is_partial,
        details=measured.details,
    )


def _require_same_data(context: StepContext, source: DataSource) -> None:
    """Raise ConfigMismatch if the source differs from the one the run began with, or measured before."""
    run = context.run
    known = [measured.source_digest for measured in measurements_of(run) if measured.source == source.name]
    identity = facts_of(run).identity.data
    known += [identity[source.name]] if source.name in identity else []
    if any(digest != source.digest() for digest in known):
        raise ConfigMismatch(
            f"{source.name} has changed since {run.label} began, or was evaluated on it: put the old data back, or "
            "give the new data another name, so that its figures stand beside the old ones"
        )
