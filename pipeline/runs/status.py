"""State of a run, from its commits: steps, losses, metrics, and how long the rest will take. Reads, never writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.rundir.lease import holder_of, is_known_dead
from pipeline.rundir.records import ENVIRONMENT, EnvironmentChange, JsonObject
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.committed import CommittedResult, results_of, stored_budget
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.lamp_plan import steps_of
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.reporting import BlockReport, BlockTraining, Series
from pipeline.steps.results import EvaluateResult, LossRecord, ZeroShotResult, judged
from pipeline.steps.run_facts import StoredBlockBudget, facts_of
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
    headline: str = ""  # what its result says, in a few words
    is_tabled: bool = False  # its result stands in the tables of blocks, metrics or accuracies
    series: tuple[Series, ...] = ()


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
class TrainingState:
    """One training of a block.

    Attributes:
        name: Which training, for example "compensation".
        before: Losses of the weights that it began with.
        after: Losses of the weights that were kept.
        epochs: Losses of each epoch. `trained` is the mean over the epoch's own steps, each from before its update.
        kept_epoch: The epoch whose weights were kept, from 1; 0: those from before.
    """

    name: str
    before: LossRecord
    after: LossRecord
    epochs: tuple[LossRecord, ...]
    kept_epoch: int

    @property
    def judged(self) -> tuple[float | None, float | None]:
        """Loss before and after, on the held-out samples where there are any."""
        return judged(self.before, self.after)


@dataclass(frozen=True)
class BlockState:
    """One block's budget, and what its steps have done."""

    block: int
    state: str  # "waiting", or what its last step made of it: "compensated", "pruned", "refined"
    size: int
    num_masked: int  # what the budget asks for
    num_found: int | None  # masked weights, counted on the weights as exported; None: not finished yet
    num_other_zeros: int | None  # zeros beside them
    trainings: tuple[TrainingState, ...]
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
    remaining_until: str | None  # the long step to come that `remaining_s` leaves out; None: it is that of all steps
    pruning_s: float  # calibrate to export, without evaluations
    peak_memory_bytes: int | None  # of the process, in these steps
    peak_device_bytes: int | None  # of a GPU
    steps: tuple[StepState, ...]
    blocks: tuple[BlockState, ...]
    evaluations: tuple[EvaluationResult, ...]
    accuracies: tuple[AccuracyResult, ...]
    end_loss: EndLossResult | None  # how far the exported model's output is from the original's; None: not measured
    num_prunable: int
    num_masked: int | None  # in the exported model; None before export
    num_other_zeros: int | None
    model: str | None  # where the exported one is
    model_size_bytes: int | None  # of its weights, as plain matrices
    environment_changes: tuple[str, ...]  # how the machine, or versions, changed since the run began
    holder: str | None  # who is working on it now, as far as its lease says

    @property
    def goal(self) -> str:
        """Sparsity and quantization for people, with the sparsity that the budget of all layers comes to."""
        if not self.config.layer_sparsity:
            return self.config.goal
        budgeted = sum(block.num_masked for block in self.blocks) / self.num_prunable
        return self.config.goal_at(round(budgeted, 4))

    @property
    def sparsity(self) -> float | None:
        """Masked weights over prunable weights in the exported model."""
        return None if self.num_masked is None else self.num_masked / self.num_prunable


def status(run: RunDirectory, config: RunConfig) -> RunStatus:
    """The state of a run, from its manifest and commits alone. Raises DamagedData where those make no sense."""
    results, steps = results_of(run), steps_of(run, config)
    by_step = {one.step: one for one in results}
    states = tuple(_step_state(step, by_step.get(step.name)) for step in steps)
    todo = [state for state in states if not state.is_done]
    budget, model = stored_budget(run), facts_of(run).model
    exported = next((one.exported for one in reversed(results) if one.exported is not None), None)
    pruning = [one.commit for one in results if not one.kind.is_measurement]
    measured = pruning or run.commits
    remaining_s, remaining_until = _remaining(states)
    return RunStatus(
        label=run.label,
        task=model.task,
        config=config,
        is_finished=not todo,
        next_step=todo[0].name if todo else None,
        num_done=len(states) - len(todo),
        elapsed_s=sum(commit.elapsed_s for commit in run.commits),
        remaining_s=remaining_s,
        remaining_until=remaining_until,
        pruning_s=sum(commit.elapsed_s for commit in pruning),
        peak_memory_bytes=max((c.peak_memory_bytes or 0 for c in measured), default=0) or None,
        peak_device_bytes=max((c.peak_device_bytes or 0 for c in measured), default=0) or None,
        steps=states,
        blocks=tuple(_block_state(index, one, _reports(index, steps, by_step)) for index, one in enumerate(budget)),
        evaluations=tuple(evaluation_of(one.step, one.measurement) for one in results if one.measurement is not None),
        accuracies=tuple(_accuracy_of(one.step, one.accuracies) for one in results if one.accuracies is not None),
        end_loss=next((one.end_loss for one in reversed(results) if one.end_loss is not None), None),
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


def _step_state(step: Step, done: CommittedResult | None) -> StepState:
    if done is None:
        return StepState(step.name, step.kind, step.block, False)
    commit, tabled = done.commit, (done.block_report, done.measurement, done.accuracies)
    return StepState(
        name=step.name,
        kind=step.kind,
        block=step.block,
        is_done=True,
        elapsed_s=commit.elapsed_s,
        peak_memory_bytes=commit.peak_memory_bytes,
        peak_device_bytes=commit.peak_device_bytes,
        headline=done.headline,
        is_tabled=any(part is not None for part in tabled),
        series=done.kind.series(done.result),
    )


def _remaining(states: Sequence[StepState]) -> tuple[float | None, str | None]:
    """The time of the steps to come, and the long step up to which it counts because that one's is not known.

    Each step takes as long as the median of its kind so far. None while the work on blocks cannot be estimated; other
    steps of unknown time are left out.
    """
    seconds: dict[str, list[float]] = {}
    for state in states:
        if state.elapsed_s is not None:
            seconds.setdefault(state.kind, []).append(state.elapsed_s)
    todo = [state for state in states if not state.is_done]
    is_unknown = [state.kind not in seconds for state in todo]
    long = next((i for i, s in enumerate(todo) if is_unknown[i] and STEP_KINDS.get(s.kind).is_long), None)
    if any(state.block is not None and is_unknown[i] for i, state in enumerate(todo)):
        return None, None
    known = [statistics.median(seconds[state.kind]) for state in todo[:long] if state.kind in seconds]
    return sum(known) if known or not todo else None, None if long is None else todo[long].name


def _reports(block: int, steps: Sequence[Step], by_step: Mapping[str, CommittedResult]) -> list[BlockReport]:
    """What the steps of a block say of it, in the order of the plan."""
    done = (by_step.get(step.name) for step in steps if step.block == block)
    return [one.block_report for one in done if one is not None and one.block_report is not None]


def _block_state(index: int, budget: StoredBlockBudget, reports: Sequence[BlockReport]) -> BlockState:
    finished = next((report.finished for report in reversed(reports) if report.finished is not None), None)
    counted = finished.layers if finished is not None else {}
    errors = {name: error for report in reports for name, error in report.relative_errors.items()}
    return BlockState(
        block=index,
        state=reports[-1].state if reports else "waiting",
        size=budget.size,
        num_masked=sum(layer.num_masked for layer in budget.layers),
        num_found=finished.num_masked if finished is not None else None,
        num_other_zeros=finished.num_other_zeros if finished is not None else None,
        trainings=tuple(_training_state(report.training) for report in reports if report.training is not None),
        layers=tuple(
            LayerState(
                layer.name,
                layer.role,
                layer.size,
                layer.num_masked,
                errors.get(layer.name),
                counted[layer.name].num_masked if layer.name in counted else None,
                counted[layer.name].num_other_zeros if layer.name in counted else None,
            )
            for layer in budget.layers
        ),
    )


def _training_state(training: BlockTraining) -> TrainingState:
    record = training.record
    return TrainingState(
        name=training.name,
        before=record.before,
        after=record.after,
        epochs=record.epoch_losses,
        kept_epoch=record.kept_epoch,
    )
