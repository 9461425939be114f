"""Step: record the input of block 0, and its dense output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.results import CaptureResult

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class Capture(StepKind[CaptureResult]):
    """Writes the input of block 0 and, where a later step reads it, the dense output of block 0."""

    result = CaptureResult
    name = "capture"
    title = "record the input of block 0"
    help = "Run the embeddings on the calibration set and record the input of block 0."
    sharing = "same data and environment"
    command = name

    @staticmethod
    def step(*, with_dense: bool) -> Step:
        """The step in the plan. with_dense: a later step reads the dense output of block 0."""
        outputs = (payloads.biased(0), payloads.dense(1)) if with_dense else (payloads.biased(0),)
        return Step(Capture.name, reads=(payloads.CALIBRATION.name,), outputs=outputs)

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> CaptureResult:
        from stages.capture import capture

        name = payloads.dense(1).name
        dense = context.activations(attempt, name) if name in step.writes else None
        biased = context.activations(attempt, payloads.biased(0).name)
        capture(context.stage(callbacks), biased, dense)
        return CaptureResult()

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        return context.stream_bytes
