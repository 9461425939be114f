"""Step: measure the zero-shot accuracy of a model on one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps.model_measurement import ModelMeasurement, measured_models
from pipeline.steps.results import Which, ZeroShotResult

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks
    from stages.metrics.zero_shot import ZeroShot


@dataclass(frozen=True)
class ZeroShotEvaluation:
    """What one zero-shot step measures.

    Attributes:
        which: "dense" (the original model) or "pruned".
        task: Name of the task.
        data: Folder with the rows; None: they come from the hub.
        limit: Number of rows to use, from the first; None: all.
    """

    which: Which
    task: str
    data: str | None
    limit: int | None

    @property
    def subject(self) -> str:
        """The part of the step's name after ``zero-shot/``. Two evaluations with the same subject are the same."""
        where = f"@{self.data}" if self.data is not None else ""
        limit = f":{self.limit}" if self.limit is not None else ""
        return f"{self.which}/{self.task}{where}{limit}"


class ZeroShotStep(ModelMeasurement[ZeroShotResult]):
    """Measures accuracy with the whole model in memory; writes no payload."""

    result = ZeroShotResult
    name = "zero-shot"
    title = "zero-shot accuracy"
    help = "Measure zero-shot accuracy on one task, by lm-evaluation-harness."

    def __init__(self) -> None:
        self._loaded: tuple[str, ZeroShot] | None = None  # which model is in memory

    @classmethod
    def after_export(cls, config: RunConfig) -> Iterable[Step]:
        """One step for each task; all tasks of one model together, because the whole model is loaded for them."""
        return zero_shot_steps(config.tasks, config.task_data, config.task_limit, config.evaluate_dense)

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> ZeroShotResult:
        from pipeline.steps.stage_settings import task_data_of
        from stages.metrics.zero_shot import ZeroShot

        what = step.request
        assert isinstance(what, ZeroShotEvaluation)
        data = task_data_of(context.config)
        if self._loaded is None or self._loaded[0] != what.which:
            self._loaded = None  # never two models in memory
            folder = context.exported_folder() if what.which == "pruned" else context.model.source
            self._loaded = (what.which, ZeroShot(folder, context.choices.device))
        result = self._loaded[1].measure(what.task, data, what.limit, callbacks)
        return ZeroShotResult(
            which=what.which,
            task=result.task,
            metrics=dict(result.metrics),
            num_rows=result.num_rows,
            num_rows_available=result.num_rows_available,
            task_version=result.task_version,
            harness_version=result.harness_version,
            is_partial=result.is_partial,
            task_data=what.data,
            task_data_digest=dict(data.digest(what.task)) if data is not None else None,
        )

    @classmethod
    def headline(cls, result: ZeroShotResult) -> str:
        shown = [
            f"{name} {100 * value:.2f}%"
            for name, value in result.metrics.items()
            if name in ("acc", "acc_norm") and value is not None
        ]
        return ", ".join(shown) + (" (partial)" if result.is_partial else "")

    @classmethod
    def accuracies(cls, result: ZeroShotResult) -> ZeroShotResult:
        return result


def zero_shot_steps(tasks: Sequence[str], data: str | None, limit: int | None, with_dense: bool) -> tuple[Step, ...]:
    """The zero-shot steps of these tasks, none twice."""
    return ZeroShotStep.steps(
        ZeroShotEvaluation(which, task, data, limit) for which in measured_models(with_dense) for task in tasks
    )
