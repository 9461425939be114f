"""Step: prune a block, and quantize it if the run does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import (
    finished_bytes,
    masks_bytes,
    training_bytes,
    write_finished,
    write_masks,
    write_state,
)
from pipeline.steps.committed import stored_budget
from pipeline.steps.reporting import BlockReport
from pipeline.steps.results import ExpertsRecord, FinishedRecord, LayerResult, PruneResult

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class PruneBlock(StepKind[PruneResult]):
    """Writes the pruned block and its masks, and the block's output where a later step reads it."""

    result = PruneResult
    name = "prune-block"
    title = "prune a block"
    help = "Choose the pruning masks of a block and set its remaining weights."
    is_per_block = True
    command = name
    sharing = "same steps"

    @staticmethod
    def step(
        block: int, *, reads_data: bool, reads_compensated: bool, writes_unrefined: bool, with_output: bool
    ) -> Step:
        """The step in the plan.

        Args:
            block: Index of the block.
            reads_data: The pruner uses statistics of the block's input.
            reads_compensated: A step before compensated the block; otherwise its weights are the original ones.
            writes_unrefined: A later step refines the pruned block and writes its final weights.
            with_output: A later block reads the output of this one.
        """
        data = (payloads.CALIBRATION.name, payloads.biased(block).name) if reads_data else ()
        weights = (payloads.compensated(block).name,) if reads_compensated else ()
        output = (payloads.biased(block + 1),) if with_output else ()
        results = (payloads.unrefined(block),) if writes_unrefined else (payloads.pruned(block), *output)
        return Step(PruneBlock.name, block, reads=(*data, *weights), outputs=(payloads.masks(block), *results))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> PruneResult:
        from pipeline.steps.stage_settings import block_budget, pruner_of
        from stages import export
        from stages.formats.checkpoint_files import StateFile
        from stages.formats.pruning_masks import mask_file
        from stages.prune_block import prune_block

        block, model, run = step.block, context.model, context.run
        assert block is not None
        reads_compensated = payloads.compensated(block).name in step.reads
        reads_data = payloads.biased(block).name in step.reads
        is_finished = payloads.pruned(block).name in step.writes
        result = prune_block(
            context.stage(callbacks, reads_data=reads_data).block(block),
            pruner_of(context.config),
            block_budget(stored_budget(run)[block]),
            run.open_stream(payloads.biased(block).name) if reads_data else None,
            state=StateFile(run.open_file(payloads.compensated(block).name)) if reads_compensated else None,
            output=context.block_output(step, attempt) if is_finished else None,
            room_bytes=context.room_bytes(block),
        )
        contents = mask_file(export.pruned_weights(model, block, result.outcome))
        write_masks(attempt, block, contents)
        layers = {
            name: LayerResult(relative_error=layer.relative_error, damping=layer.damping)
            for name, layer in result.outcome.layers.items()
        }
        experts = ExpertsRecord.of(result.experts) if result.experts is not None else None
        if result.state is not None:
            write_state(attempt, payloads.unrefined(block).name, result.state)
            return PruneResult(layers=layers, experts=experts)
        assert result.finished is not None
        write_finished(context, attempt, block, result.finished)
        return PruneResult(layers=layers, finished=FinishedRecord.of(result.finished), experts=experts)

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        assert step.block is not None
        sizes = {
            payloads.masks(step.block).name: masks_bytes,
            payloads.pruned(step.block).name: finished_bytes,
            payloads.unrefined(step.block).name: training_bytes,
        }
        return sizes[payload](context, step.block) if payload in sizes else context.stream_bytes

    @classmethod
    def block_report(cls, result: PruneResult) -> BlockReport:
        errors = {name: layer.relative_error for name, layer in result.layers.items()}
        return BlockReport("pruned", relative_errors=errors, finished=result.finished)
