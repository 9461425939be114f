"""Step: read the calibration set."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.errors import ConfigMismatch
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.bos_choice import bos_for
from pipeline.steps.results import CalibrateResult
from pipeline.steps.run_facts import facts_of

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.data.drawing import Drawing
    from stages.interfaces import Callbacks, Stream


class Calibrate(StepKind[CalibrateResult]):
    """Writes the calibration set: token ids of text windows, or preprocessed images."""

    result = CalibrateResult
    name = "calibrate"
    title = "read the calibration set"
    help = "Read the calibration samples and tokenize or preprocess them."
    sharing = "same data"
    command = name

    @staticmethod
    def step() -> Step:
        """The step in the plan."""
        return Step(Calibrate.name, outputs=(payloads.CALIBRATION,))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> CalibrateResult:
        from pipeline.steps.stage_settings import drawing_of

        return draw_samples(context, payloads.CALIBRATION.name, drawing_of(context.config), attempt, callbacks)[1]

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        return context.num_tokens * context.model.input_bytes_per_token

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        from stages.choose_bos import NUM_WINDOWS

        measures = context.config.bos == "auto"
        return context.activation_bytes(NUM_WINDOWS * context.config.seqlen) if measures else 0

    @classmethod
    def headline(cls, result: CalibrateResult) -> str:
        num_skipped = sum(result.skipped.values())
        note = f", {num_skipped} passed over" if num_skipped else ""
        return f"{result.amount:,} {result.unit} of {result.source}{note}"


def draw_samples(
    context: StepContext, payload: str, drawing: Drawing, attempt: Attempt, callbacks: Callbacks
) -> tuple[Stream, CalibrateResult]:
    """Write samples of the run's data source.

    Args:
        context: The run.
        payload: Name of the payload with the samples.
        drawing: Which; the first ones are the same however many there are, if sampling is contiguous.
        attempt: Receives the payload.
        callbacks: Progress and stops.

    Returns:
        The samples as they were stored, and what they are.

    Raises:
        ConfigMismatch: The data has changed since the run began.
    """
    from stages.data.registry import parse_source

    config = context.config
    assert config.calibration is not None
    source = parse_source(config.calibration)
    if source.digest() != facts_of(context.run).identity.data[config.calibration]:
        raise ConfigMismatch(
            f"{config.calibration} has changed since this run began: put the old data back, or start a new run"
        )
    chosen = None
    if context.task.reads_text:
        protocol = replace(config.evaluation_protocol, seqlen=config.seqlen)
        chosen = bos_for(context, source, protocol, "calibration", attempt, callbacks)
        drawing = replace(drawing, bos=chosen.mode)
    drawn = context.task.draw(context.model, source, drawing, callbacks)
    samples, first = drawn.samples, drawn.samples[0]
    stream = attempt.stream(payload, len(samples), tuple(first.shape), first.dtype, is_precious=True)
    for index in range(len(samples)):
        callbacks.check_stop()
        stream.write(index, samples[index])
        callbacks.report(index + 1, len(samples), "samples")
    return stream, CalibrateResult(
        source=config.calibration, unit=drawn.unit, amount=drawn.amount, skipped=dict(drawn.skipped), bos=chosen
    )
