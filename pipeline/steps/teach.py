"""Step: compute the original model's output on the samples to distill on, where no earlier step did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.calibrate import draw_samples
from pipeline.steps.results import CalibrateResult, TeachResult

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks, Stream


class Teach(StepKind[TeachResult]):
    """Writes the last block's output in the original model, and the distillation set if it is not the calibration set.

    LAMP has that output already on the calibration set: it is the dense stream's end, unless the blocks are those of
    another run.
    """

    result = TeachResult
    name = "teach"
    title = "run the original model for distillation"
    help = "Run the original model on the samples to distill on (--distill)."
    command = name
    absence = (
        "it is part of runs with --distill of other methods than lamp, with --distill-samples or --from-run; "
        "see `lampctl status {run}` for the steps of this one"
    )

    @staticmethod
    def step(num_blocks: int, *, draws: bool) -> Step:
        """The step in the plan.

        Args:
            num_blocks: Of the model.
            draws: There is a distillation set of its own (--distill-samples).
        """
        if draws:
            teacher = payloads.teacher(num_blocks, payloads.DISTILLATION_SET)
            return Step(Teach.name, outputs=(payloads.DISTILLATION_SET, teacher))
        teacher = payloads.teacher(num_blocks, payloads.CALIBRATION)
        return Step(Teach.name, reads=(payloads.CALIBRATION.name,), outputs=(teacher,))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> TeachResult:
        from pipeline.steps.stage_settings import distillation_drawing_of

        drawn: CalibrateResult | None = None
        inputs = context.calibration if payloads.CALIBRATION.name in step.reads else None
        if inputs is None:
            drawing = distillation_drawing_of(context.config)
            inputs, drawn = draw_samples(context, payloads.DISTILLATION_SET.name, drawing, attempt, callbacks)
        run_original(context, inputs, step, attempt, callbacks)
        return TeachResult(samples=drawn)

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        if payload == payloads.DISTILLATION_SET.name:
            return context.num_distillation_tokens * context.model.input_bytes_per_token
        return context.activation_bytes(context.num_distillation_tokens)

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        return context.activation_bytes(context.num_distillation_tokens)

    @classmethod
    def headline(cls, result: TeachResult) -> str:
        return f"{result.samples.amount:,} {result.samples.unit}" if result.samples is not None else ""


def run_original(context: StepContext, inputs: Stream, step: Step, attempt: Attempt, callbacks: Callbacks) -> None:
    """Write the last block's output in the original model on `inputs`: the stream among the step's payloads."""
    from stages.replay import replay
    from stages.runtime.block_context import StageContext

    output = next(output.name for output in step.outputs if output.is_stream)
    shape = context.model.hidden_shape(tuple(inputs[0].shape))
    stream = attempt.stream(output, len(inputs), shape, context.choices.torch_dtype)
    stage = StageContext(context.model, inputs, context.choices, callbacks)
    replay(stage, stream, context.model.num_blocks, lambda index: None, attempt.scratch())
