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

    @staticmethod
    def step() -> Step:
        """The step in the plan."""
        return Step(Allocate.name, reads=(payloads.CALIBRATION.name, payloads.biased(0).name))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> AllocateResult:
        from pipeline.steps.stage_settings import fixed_sparsities, prunable_layers
        from stages.allocate import outlier_shares
        from stages.sparsity.owl import budget_by_outliers

        config = context.config
        assert config.budget_spread is not None
        assert config.alpha is not None
        assert config.beta is not None
        names = {layer.name for block in facts_of(context.run).budget for layer in block.layers}
        hidden = context.run.open_stream(payloads.biased(0).name)
        shares = outlier_shares(context.stage(callbacks), hidden, names, attempt.scratch())
        every = prunable_layers(context.model, config.ignore, prune_all=True)
        blocks = [[layer for layer in block if layer.name in names] for block in every]
        fixed = fixed_sparsities(blocks, config.layer_sparsity)
        budget, spread = budget_by_outliers(
            blocks, shares, config.budget_spread, config.target_sparsity, config.alpha, config.beta, fixed
        )
        if spread != config.budget_spread:
            callbacks.warn(f"the spread of the budget is {spread:g}: no layer can be pruned above 100% or below 0%")
        records = tuple(StoredBlockBudget.of(block) for block in budget)
        return AllocateResult(outlier_shares=tuple(shares), spread=spread, budget=records)

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        return context.stream_bytes

    @classmethod
    def headline(cls, result: AllocateResult) -> str:
        return f"spread of the budget {result.spread:g}"

    @classmethod
    def budget(cls, result: AllocateResult) -> tuple[StoredBlockBudget, ...]:
        return result.budget
