"""State of a run, from its commits: steps, losses, metrics, and how long the rest will take. Reads, never writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.rundir.lease import holder_of, is_known_dead
from pipeline.rundir.records import ENVIRONMENT, EnvironmentChange, JsonObject, StepCommit
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.evaluate import evaluations_of
from pipeline.steps.lamp_plan import steps_of
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.results import (
    CompensateResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
    RefineResult,
    TrainingRecord,
    ZeroShotResult,
    budget_of_run,
)
from pipeline.steps.run_facts import BlockBudgetRecord, facts_of
from pipeline.steps.zero_shot import accuracies_of
from stages.metrics.details import Details

# Metric, source, protocol (tokens of a window, place of the points), amount of data, whether it is partial.
MeasuredOn = tuple[str, str, str, int, bool]


@dataclass(frozen=True)
class StepState:
    """One step of the plan, done or not."""

    name: str
    kind: str
    block: int | None
    is_done: bool
    elapsed_s: float | None = None
    peak_memory_bytes: int | None = None  # of the process
    peak_device_bytes: int | None = None  # of a GPU; None: there was none


@dataclass(frozen=True)
class LayerState:
    """One layer's budget, and how its pruning went (None: not pruned yet)."""

    name: str
    role: str | None
    size: int
    num_masked: int  # what the budget asks for
    relative_error: float | None
    num_found: int | None  # masked weights, counted on the weights as exported; None: not finished yet
    num_other_zeros: int | None  # zeros beside them


@dataclass(frozen=True)
class EpochLoss:
    """The mean losses of one epoch of training."""

    trained: float | None  # over the epoch's own steps
    aside: float | None  # after it, on the held-out samples; None: there are none


@dataclass(frozen=True)
class BlockState:
    """One block's budget, compensation and pruning."""

    block: int
    state: str  # "waiting", "compensated", "pruned", "refined"
    size: int
    num_masked: int
    num_other_zeros: int | None
    loss_before: float | None
    loss_after: float | None
    loss_before_aside: float | None
    loss_after_aside: float | None
    refine_before: float | None  # the same for the training of the block once pruned
    refine_after: float | None
    refine_before_aside: float | None
    refine_after_aside: float | None
    epochs: tuple[EpochLoss, ...]  # of compensation
    kept_epoch: int | None  # the one whose weights were kept, from 1; 0: those from before
    refine_epochs: tuple[EpochLoss, ...]
    refine_kept_epoch: int | None
    layers: tuple[LayerState, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluate step measured.

    Attributes:
        step: Name of the step.
        which: "dense" (the original model) or "pruned".
        source: Name of the data source.
        metric: Name of the metric: "perplexity", "iou".
        value: Its value; None: it overflowed.
        is_partial: Only a part of the data was used.
        details: What it was measured on, as the metric says it.
    """

    step: str
    which: str
    source: str
    metric: str
    value: float | None
    is_partial: bool
    details: Details

    @property
    def amount(self) -> int:
        """Number of tokens, masks or the like that it was measured on."""
        return self.details.amount

    @property
    def measured_on(self) -> MeasuredOn:
        """What two results must share to be compared."""
        return (self.metric, self.source, self.details.protocol, self.amount, self.is_partial)

    def record(self) -> JsonObject:
        """The same as one JSON object."""
        about = {"step": self.step, "which": self.which, "source": self.source, "metric": self.metric}
        return {**about, self.metric: self.value, **self.details.as_json(), "is_partial": self.is_partial}


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracies on one zero-shot task.

    Attributes:
        step: Name of the step that measured them.
        which: "dense" (the original model) or "pruned".
        task: Name of the task.
        metrics: "acc", "acc_norm", "acc_stderr", ...
        num_rows: Rows that were used.
        num_rows_available: Rows of the task.
        is_partial: Only the first rows were used.
        task_data: Folder with the rows; None: the hub.
        harness_version: Version of lm-evaluation-harness.
    """

    step: str
    which: str
    task: str
    metrics: Mapping[str, float]
    num_rows: int
    num_rows_available: int
    is_partial: bool
    task_data: str | None
    harness_version: str


@dataclass(frozen=True)
class RunStatus:
    """A run at a glance."""

    label: str  # of the run directory
    task: str  # a name of `stages.tasks.registry.TASKS`
    config: RunConfig
    is_finished: bool
    next_step: str | None
    num_done: int
    elapsed_s: float
    remaining_s: float | None  # estimated; None while nothing comparable has run
    pruning_s: float  # calibrate to export, without evaluations
    peak_memory_bytes: int | None  # of the process, in these steps
    peak_device_bytes: int | None  # of a GPU
    steps: tuple[StepState, ...]
    blocks: tuple[BlockState, ...]
    evaluations: tuple[EvaluationResult, ...]
    accuracies: tuple[AccuracyResult, ...]
    num_prunable: int
    num_masked: int | None  # in the exported model; None before export
    num_other_zeros: int | None
    model: str | None  # where the exported one is
    model_size_bytes: int | None  # of its weights, as plain matrices
    environment_changes: tuple[str, ...]  # how the machine, or versions, changed since the run began
    holder: str | None  # who is working on it now, as far as its lease says

    @property
    def sparsity(self) -> float | None:
        """Masked weights over prunable weights in the exported model."""
        return None if self.num_masked is None else self.num_masked / self.num_prunable


def status(run: RunDirectory, config: RunConfig) -> RunStatus:
    """The state of a run, from its manifest and commits alone. Raises DamagedData where those make no sense."""
    steps = steps_of(run, config)
    by_name = {commit.step: commit for commit in run.commits}
    states = tuple(_step_state(step, by_name.get(step.name)) for step in steps)
    todo = [state for state in states if not state.is_done]
    budget, model = budget_of_run(run), facts_of(run).model
    exported = by_name["export"].result_as(ExportResult) if "export" in by_name else None
    pruning = [commit for commit in run.commits if _prunes(commit)]
    measured = pruning or run.commits
    return RunStatus(
        label=run.label,
        task=model.task,
        config=config,
        is_finished=not todo,
        next_step=todo[0].name if todo else None,
        num_done=len(states) - len(todo),
        elapsed_s=sum(commit.elapsed_s for commit in run.commits),
        remaining_s=_remaining_s(states),
        pruning_s=sum(commit.elapsed_s for commit in pruning),
        peak_memory_bytes=max((c.peak_memory_bytes or 0 for c in measured), default=0) or None,
        peak_device_bytes=max((c.peak_device_bytes or 0 for c in measured), default=0) or None,
        steps=states,
        blocks=tuple(_block_state(i, b, by_name, bool(config.refine)) for i, b in enumerate(budget)),
        evaluations=tuple(evaluation_of(*measured) for measured in evaluations_of(run)),
        accuracies=tuple(_accuracy_of(*measured) for measured in accuracies_of(run)),
        num_prunable=sum(block.size for block in budget),
        num_masked=exported.num_masked if exported else None,
        num_other_zeros=exported.num_other_zeros if exported else None,
        model=f"{run.label}/model" if exported else None,
        model_size_bytes=exported.size_bytes if exported else None,
        environment_changes=tuple(
            f"from commit {record.number} on: {change}"
            for record in run.log
            if record.step == ENVIRONMENT
            for change in record.result_as(EnvironmentChange).changes
        ),
        holder=None if todo == [] else _holder(run),
    )


def _prunes(commit: StepCommit) -> bool:
    """Whether a commit is of a step of the pruning itself, not of a measurement or of a rebuilt payload."""
    kind = commit.step.partition("/")[0]
    return kind in STEP_KINDS and not STEP_KINDS.get(kind).is_measurement


def evaluation_of(step: str, measured: EvaluateResult) -> EvaluationResult:
    """The state of an evaluate step, from the result in its commit."""
    return EvaluationResult(
        step, measured.which, measured.source, measured.metric, measured.value, measured.is_partial, measured.details
    )


def _accuracy_of(step: str, measured: ZeroShotResult) -> AccuracyResult:
    return AccuracyResult(
        step=step,
        which=measured.which,
        task=measured.task,
        metrics={name: value for name, value in measured.metrics.items() if value is not None},
        num_rows=measured.num_rows,
        num_rows_available=measured.num_rows_available,
        is_partial=measured.is_partial,
        task_data=measured.task_data,
        harness_version=measured.harness_version,
    )


def side_by_side(
    evaluations: Sequence[EvaluationResult],
) -> list[dict[str, EvaluationResult]]:
    """Dense and pruned results together where both were measured on the very same data, and only there."""
    rows: dict[MeasuredOn, dict[str, EvaluationResult]] = {}
    for result in evaluations:
        rows.setdefault(result.measured_on, {})[result.which] = result
    return list(rows.values())


def described(result: EvaluationResult) -> str:
    """How a metric was measured, in a few words."""
    return result.details.described(is_partial=result.is_partial)


def _holder(run: RunDirectory) -> str | None:
    holder = holder_of(run)
    return None if holder is None or is_known_dead(holder) else holder.shown


def _step_state(step: Step, commit: StepCommit | None) -> StepState:
    if commit is None:
        return StepState(step.name, step.kind, step.block, False)
    peaks = (commit.peak_memory_bytes, commit.peak_device_bytes)
    return StepState(step.name, step.kind, step.block, True, commit.elapsed_s, *peaks)


def _remaining_s(states: Sequence[StepState]) -> float | None:
    """Each step to come takes as long as the median of its kind so far.

    None while the work on blocks cannot be estimated; export and evaluations that nothing is known of are left out.
    """
    seconds: dict[str, list[float]] = {}
    for state in states:
        if state.elapsed_s is not None:
            seconds.setdefault(state.kind, []).append(state.elapsed_s)
    todo = [state for state in states if not state.is_done]
    if any(state.block is not None and state.kind not in seconds for state in todo):
        return None
    known = [statistics.median(seconds[state.kind]) for state in todo if state.kind in seconds]
    return sum(known) if known or not todo else None


def _block_state(
    index: int, budget: BlockBudgetRecord, by_name: Mapping[str, StepCommit], has_refine: bool
) -> BlockState:
    commits = [by_name.get(f"{kind}/{index}") for kind in ("compensate-block", "prune-block", "refine-block")]
    compensated = commits[0].result_as(CompensateResult) if commits[0] else None
    pruned = commits[1].result_as(PruneResult) if commits[1] else None
    refined = commits[2].result_as(RefineResult) if commits[2] else None
    training = compensated.training if compensated else None
    refinement = refined.training if refined else None
    outcome = pruned.layers if pruned else {}
    finished = (refined.finished if refined else None) if has_refine else (pruned.finished if pruned else None)
    counted = finished.layers if finished else {}
    return BlockState(
        block=index,
        state="refined" if refined else "pruned" if pruned else "compensated" if compensated else "waiting",
        size=budget.size,
        num_masked=sum(layer.num_masked for layer in budget.layers),
        num_other_zeros=finished.num_other_zeros if finished else None,
        loss_before=training.before.trained if training else None,
        loss_after=training.after.trained if training else None,
        loss_before_aside=training.before.held_out if training else None,
        loss_after_aside=training.after.held_out if training else None,
        refine_before=refinement.before.trained if refinement else None,
        refine_after=refinement.after.trained if refinement else None,
        refine_before_aside=refinement.before.held_out if refinement else None,
        refine_after_aside=refinement.after.held_out if refinement else None,
        epochs=_epochs(training),
        kept_epoch=training.kept_epoch if training else None,
        refine_epochs=_epochs(refinement),
        refine_kept_epoch=refinement.kept_epoch if refinement else None,
        layers=tuple(
            LayerState(
                layer.name,
                layer.role,
                layer.size,
                layer.num_masked,
                outcome[layer.name].relative_error if layer.name in outcome else None,
                counted[layer.name].num_masked if layer.name in counted else None,
                counted[layer.name].num_other_zeros if layer.name in counted else None,
            )
            for layer in budget.layers
        ),
    )


def _epochs(training: TrainingRecord | None) -> tuple[EpochLoss, ...]:
    losses = training.epoch_losses if training else ()
    return tuple(EpochLoss(epoch.trained, epoch.held_out) for epoch in losses)
