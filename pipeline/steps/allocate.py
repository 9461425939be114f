"""Step: decide the budget from the outliers in the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.results import AllocateResult
from pipeline.steps.run_facts import StoredBlockBudget, facts_of

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class Allocate(StepKind[AllocateResult]):
    """Gives each block its share of the sparsity, from a first pass of the original model; writes no payload."""

    result = AllocateResult
    name = "allocate"
    title = "decide the budget"
    help = "Give each block its share of the sparsity by a pass of the original model (--budget outliers)."
    command = name
    sharing = "same steps"

    @staticmethod
    def step() -> Step:
        """The step in the plan."""
        return Step(Allocate.name, reads=(payloads.CALIBRATION.name, payloads.biased(0).name))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> AllocateResult:
        from pipeline.steps.stage_settings import outlier_settings
        from stages.allocate import allocate_by_outliers

        names = {layer.name for block in facts_of(context.run).budget for layer in block.layers}
        hidden = context.run.open_stream(payloads.biased(0).name)
        settings = outlier_settings(context.config, context.model, names)
        found = allocate_by_outliers(context.stage(callbacks), hidden, settings, attempt.scratch())
        records = tuple(StoredBlockBudget.of(block) for block in found.blocks)
        return AllocateResult(outlier_shares=found.shares, spread=found.spread, budget=records)

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        return context.stream_bytes

    @classmethod
    def headline(cls, result: AllocateResult) -> str:
        return f"spread of the budget {result.spread:g}"

    @classmethod
    def budget(cls, result: AllocateResult) -> tuple[StoredBlockBudget, ...]:
        return result.budget
