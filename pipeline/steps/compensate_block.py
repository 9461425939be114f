"""Step: train a block to undo the error of the pruned blocks before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import training_bytes, write_state
from pipeline.steps.reporting import BlockReport, BlockTraining
from pipeline.steps.results import CompensateResult, TrainingRecord

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks, Stream


class CompensateBlock(StepKind[CompensateResult]):
    """Writes the compensated weights of a block, and its dense output where a later step reads it."""

    result = CompensateResult
    name = "compensate-block"
    title = "compensate a block"
    help = "Train a block so that it undoes the error of the pruned blocks before it."
    is_per_block = True
    command = name
    sharing = "same steps"

    @staticmethod
    def step(block: int, *, with_dense: bool) -> Step:
        """The step in the plan. with_dense: a later step reads the dense output of the block."""
        reads = (payloads.CALIBRATION, payloads.biased(block), payloads.dense(block))
        dense = (payloads.dense(block + 1),) if with_dense else ()
        return Step(
            CompensateBlock.name,
            block,
            reads=tuple(payload.name for payload in reads),
            outputs=(payloads.compensated(block), *dense),
        )

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> CompensateResult:
        from pipeline.steps.stage_settings import training_settings
        from stages.compensate_block import compensate_block

        block, config, run = step.block, context.config, context.run
        assert block is not None
        biased = run.open_stream(payloads.biased(block).name)
        dense_name = payloads.dense(block + 1).name
        dense_out: Stream
        if dense_name in step.writes:
            dense_out = context.activations(attempt, dense_name)
        else:
            dense_out = attempt.scratch().stream(
                "targets", len(biased), context.hidden_shape, context.choices.torch_dtype
            )
        result = compensate_block(
            context.stage(callbacks).block(block),
            biased,
            run.open_stream(payloads.dense(block).name),
            dense_out,
            training_settings(config, config.epochs, config.lr),
            context.spill(attempt),
        )
        write_state(attempt, payloads.compensated(block).name, result.state)
        return CompensateResult(training=TrainingRecord.of(result.training))

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        assert step.block is not None
        is_weights = payload == payloads.compensated(step.block).name
        return training_bytes(context, step.block) if is_weights else context.stream_bytes

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        has_dense = any(output.is_stream for output in step.outputs)
        return 0 if has_dense else context.stream_bytes

    @classmethod
    def headline(cls, result: CompensateResult) -> str:
        return _training(result).headline

    @classmethod
    def block_report(cls, result: CompensateResult) -> BlockReport:
        return BlockReport("compensated", training=_training(result))


def _training(result: CompensateResult) -> BlockTraining:
    return BlockTraining("compensation", result.training)
