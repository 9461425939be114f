"""What the commits of a run say, each read in the form of its step kind. No kind is asked for by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import DamagedData
from pipeline.rundir.records import Result, StepCommit
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.reporting import BlockReport
from pipeline.steps.results import EvaluateResult, ExportResult, ZeroShotResult
from pipeline.steps.run_facts import StoredBlockBudget, facts_of


@dataclass(frozen=True)
class CommittedResult:
    """A commit of a step with its kind and its result."""

    commit: StepCommit
    kind: type[StepKind[Any]]
    result: Result

    @property
    def step(self) -> str:
        """Name of the step."""
        return self.commit.step

    @property
    def headline(self) -> str:
        """The result in a few words."""
        return self.kind.headline(self.result)

    @property
    def block_report(self) -> BlockReport | None:
        """What the step says of its block."""
        return self.kind.block_report(self.result)

    @property
    def measurement(self) -> EvaluateResult | None:
        """The metric that the step measured."""
        return self.kind.measurement(self.result)

    @property
    def accuracies(self) -> ZeroShotResult | None:
        """The accuracies that the step measured."""
        return self.kind.accuracies(self.result)

    @property
    def end_loss(self) -> EndLossResult | None:
        """How far the exported model's output is from the original model's."""
        return self.kind.end_loss(self.result)

    @property
    def exported(self) -> ExportResult | None:
        """What the model holds that the step exported."""
        return self.kind.exported(self.result)


def results_of(run: RunDirectory) -> tuple[CommittedResult, ...]:
    """The results of a run's steps in the order of its commits.

    Records that belong to no step, and steps of a kind that no installed package has, are left out.

    Raises:
        DamagedData: A result does not have the form of its kind.
    """
    kinds = dict(STEP_KINDS.items())
    found = ((commit, kinds.get(commit.step.partition("/")[0])) for commit in run.commits)
    return tuple(
        CommittedResult(commit, kind, commit.result_as(kind.result)) for commit, kind in found if kind is not None
    )


def measurements_of(run: RunDirectory) -> tuple[EvaluateResult, ...]:
    """All that a run has measured. Raises DamagedData."""
    return tuple(one.measurement for one in results_of(run) if one.measurement is not None)


def accuracies_of(run: RunDirectory) -> tuple[ZeroShotResult, ...]:
    """All zero-shot accuracies of a run. Raises DamagedData."""
    return tuple(one.accuracies for one in results_of(run) if one.accuracies is not None)


def stored_budget(run: RunDirectory) -> tuple[StoredBlockBudget, ...]:
    """The budget of each block: as a step decided it, or else as run.json says. Raises DamagedData."""
    num_blocks = facts_of(run).model.num_blocks
    for one in results_of(run):
        budget = one.kind.budget(one.result)
        if budget is not None and len(budget) != num_blocks:
            raise DamagedData(f"{run.label}/commits/{one.commit.number:06d}.json is damaged: a budget of other blocks")
        if budget is not None:
            return budget
    return facts_of(run).budget


def is_exported(run: RunDirectory) -> bool:
    """Whether the exported model is committed."""
    return any(payloads.MODEL.name in commit.payloads for commit in run.commits)
