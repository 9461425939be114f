"""Step: train a pruned block with its masks fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import finished_bytes, write_finished
from pipeline.steps.reporting import BlockReport, BlockTraining
from pipeline.steps.results import FinishedRecord, RefineResult, TrainingRecord

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class RefineBlock(StepKind[RefineResult]):
    """Writes the refined block, and its output where a later step reads it."""

    result = RefineResult
    name = "refine-block"
    title = "refine a block"
    help = "Train a pruned block towards its dense output with its pruning masks fixed (--refine)."
    is_per_block = True
    command = name
    sharing = "same steps"

    @staticmethod
    def step(block: int, *, with_output: bool) -> Step:
        """The step in the plan. with_output: a later block reads the output of this one."""
        reads = (payloads.CALIBRATION, payloads.biased(block), payloads.dense(block + 1))
        weights = (payloads.unrefined(block), payloads.masks(block))
        output = (payloads.biased(block + 1),) if with_output else ()
        return Step(
            RefineBlock.name,
            block,
            reads=tuple(payload.name for payload in (*reads, *weights)),
            outputs=(payloads.pruned(block), *output),
        )

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> RefineResult:
        from pipeline.steps.stage_settings import training_settings
        from stages import export
        from stages.formats.checkpoint_files import StateFile
        from stages.formats.pruning_masks import read_mask_file
        from stages.prune_block import PrunedBlock
        from stages.refine_block import refine_block

        block, config, run = step.block, context.config, context.run
        assert block is not None
        masks = read_mask_file(run.open_file(payloads.masks(block).name))
        state = StateFile(run.open_file(payloads.unrefined(block).name))
        result = refine_block(
            context.stage(callbacks).block(block),
            PrunedBlock(export.outcome_of(masks, config.n_of_m), state),
            run.open_stream(payloads.biased(block).name),
            run.open_stream(payloads.dense(block + 1).name),
            training_settings(config, config.refine_epochs, config.refine_lr),
            context.block_output(step, attempt),
            context.spill(attempt),
        )
        write_finished(context, attempt, block, result.finished)
        training = TrainingRecord.of(result.training)
        return RefineResult(training=training, finished=FinishedRecord.of(result.finished))

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        assert step.block is not None
        is_weights = payload == payloads.pruned(step.block).name
        return finished_bytes(context, step.block) if is_weights else context.stream_bytes

    @classmethod
    def headline(cls, result: RefineResult) -> str:
        return f"refined {_training(result).headline}"

    @classmethod
    def block_report(cls, result: RefineResult) -> BlockReport:
        return BlockReport("refined", training=_training(result), finished=result.finished)


def _training(result: RefineResult) -> BlockTraining:
    return BlockTraining("refinement", result.training)
