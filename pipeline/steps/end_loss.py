"""Step: measure how far the exported model's output is from the original model's, on held-out calibration samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.distill import Distill
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.results import DistillResult

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class EndLossStep(StepKind[EndLossResult]):
    """Measures the end loss, block by block over scratch streams; writes no payload."""

    result = EndLossResult
    name = "end-loss"
    title = "compare the output with the original model's"
    help = "Measure how far the pruned model's output is from the original model's, on held-out calibration samples."
    is_measurement = True
    command = "evaluate"

    @classmethod
    def after_export(cls, config: RunConfig) -> Iterable[Step]:
        """One step, for runs with a calibration set; none for runs of versions without it."""
        if not config.end_loss or not config.has_calibration_set:
            return ()
        return (Step(cls.name, reads=(payloads.MODEL.name, payloads.CALIBRATION.name)),)

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> EndLossResult:
        from stages.measure_end_loss import measure_end_loss, measured_samples
        from stages.models.registry import open_model

        config, num_samples = context.config, len(context.calibration)
        assert config.calibration is not None
        exported = open_model(context.exported_folder())
        shares_ends = config.export_dtype == "original"
        found = measure_end_loss(context.stage(callbacks), exported, attempt.scratch(), shares_ends=shares_ends)
        return EndLossResult(
            loss=found.loss,
            title=found.title,
            value=found.value if math.isfinite(found.value) else None,
            num_samples=found.num_samples,
            num_tokens=found.num_tokens,
            source=config.calibration,
            samples_sha256=found.samples_sha256,
            is_held_out=num_samples > 1,
            num_trained_on=_num_trained_on(context, measured_samples(num_samples)),
        )

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        """Hidden states of the held-out samples in both models."""
        from stages.measure_end_loss import measured_samples

        num_samples = len(measured_samples(context.config.num_samples or 1))
        return 2 * context.activation_bytes(num_samples * context.config.seqlen)

    @classmethod
    def headline(cls, result: EndLossResult) -> str:
        return f"{result.title} {result.text} {result.measured_on}"

    @classmethod
    def end_loss(cls, result: EndLossResult) -> EndLossResult:
        return result


def _num_trained_on(context: StepContext, numbers: Sequence[int]) -> int | None:
    """How many of these calibration samples a training has seen; None: not known."""
    from pipeline.steps.stage_settings import distill_settings
    from stages.training.loss import split_samples

    config, num_samples = context.config, len(context.calibration)
    trained: set[int] = set()
    if config.is_lamp and (config.refine or (config.epochs and context.model.num_blocks > 1)):
        trained.update(split_samples(num_samples, bool(config.held_out))[0])
    if config.distill and config.distill_samples is None:
        trained.update(split_samples(num_samples, distill_settings(config).holds_out)[0])
    elif config.distill:
        commit = context.run.commit_for(Distill.name)
        seen = commit.result_as(DistillResult).calibration_samples if commit is not None else None
        if seen is None:
            return None
        trained.update(seen)
    return len(trained.intersection(numbers))
