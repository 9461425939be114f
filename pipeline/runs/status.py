"""What a run's commits tell: its state, its figures, how long the rest will take. Reads, never writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.rundir.lease import holder_of, is_known_dead
from pipeline.rundir.records import ENVIRONMENT, StepCommit
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.plausible import making_sense
from pipeline.steps.lamp_plan import steps_of
from pipeline.steps.registry import STEP_KINDS
from stages.metrics.registry import how_measured


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
    aside: float | None  # after it, on the samples kept aside; None: there are none


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
    """What one evaluate step measured."""

    step: str
    which: str  # "dense" or "pruned"
    source: str
    metric: str  # the name of the figure that counts: "perplexity", "iou"
    figures: Mapping[str, Any]  # that one, and what it was measured on
    is_partial: bool

    @property
    def value(self) -> float | None:
        """The figure that counts; None: it overflowed."""
        found: float | None = self.figures[self.metric]
        return found

    @property
    def amount(self) -> int:
        """Tokens, or masks, that it was measured on."""
        found: int = self.figures["num_masks" if self.metric == "iou" else "num_tokens"]
        return found

    @property
    def measured_on(self) -> tuple[str, str, Any, int, bool]:
        """What two results must share to be compared: metric, source, window or points, amount, whether partial."""
        return (
            self.metric,
            self.source,
            self.figures.get("points", self.figures.get("seqlen")),
            self.amount,
            self.is_partial,
        )

    def record(self) -> dict[str, Any]:
        """For JSON, all in one."""
        about = {"step": self.step, "which": self.which, "source": self.source, "metric": self.metric}
        return {**about, **self.figures, "is_partial": self.is_partial}


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracies on one zero-shot task."""

    step: str  # which zero-shot step measured them
    which: str  # "dense" or "pruned"
    task: str
    metrics: dict[str, float]  # "acc", "acc_norm", "acc_stderr" ...
    num_rows: int
    num_rows_available: int
    is_partial: bool
    task_data: str | None  # the folder with the rows; None: the hub
    harness_version: str


@dataclass(frozen=True)
class RunStatus:
    """A run at a glance."""

    label: str  # of the run directory
    task: str  # "language", "vision"
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
    with making_sense(f"{run.label}/commits"):
        return _status(run, config)


def _status(run: RunDirectory, config: RunConfig) -> RunStatus:
    steps = steps_of(run, config)
    by_name = {commit.step: commit for commit in run.commits}
    states = tuple(_step_state(step, by_name.get(step.name)) for step in steps)
    todo = [state for state in states if not state.is_done]
    exported = by_name.get("export")
    pruning = [commit for commit in run.commits if _prunes(commit)]
    measured = pruning or run.commits
    return RunStatus(
        label=run.label,
        task=run.manifest.model.get("task", "language"),
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
        blocks=tuple(_block_state(i, b, by_name, bool(config.refine)) for i, b in enumerate(run.budget)),
        evaluations=evaluations_of(run),
        accuracies=accuracies_of(run),
        num_prunable=sum(layer["size"] for block in run.budget for layer in block["layers"]),
        num_masked=exported.figures["num_masked"] if exported else None,
        num_other_zeros=exported.figures["num_other_zeros"] if exported else None,
        model=f"{run.label}/model" if exported else None,
        model_size_bytes=exported.figures.get("size_bytes") if exported else None,
        environment_changes=tuple(
            f"from commit {record.number} on: {change}"
            for record in run.log
            if record.step == ENVIRONMENT
            for change in record.figures["changes"]
        ),
        holder=None if todo == [] else _holder(run),
    )


def _prunes(commit: StepCommit) -> bool:
    """Whether a commit is of a step of the pruning itself, not of a measurement or of a rebuilt payload."""
    kind = commit.step.partition("/")[0]
    return kind in STEP_KINDS and not STEP_KINDS.get(kind).is_measurement


def evaluations_of(run: RunDirectory) -> tuple[EvaluationResult, ...]:
    """All that the run has measured, in the order of its commits."""
    return tuple(
        evaluation_of(commit.step, commit.figures) for commit in run.commits if commit.step.startswith("evaluate/")
    )


def evaluation_of(step: str, figures: Mapping[str, Any]) -> EvaluationResult:
    """What an evaluate step left, as its commit has it."""
    metric = figures.get("metric", "perplexity")
    about = ("which", "source", "source_digest", "metric", "is_partial")
    rest = {name: value for name, value in figures.items() if name not in about}
    assert metric in rest
    return EvaluationResult(step, figures["which"], figures["source"], metric, rest, figures["is_partial"])


def accuracies_of(run: RunDirectory) -> tuple[AccuracyResult, ...]:
    """All zero-shot accuracies that the run has measured, in the order of their commits."""
    fields = set(AccuracyResult.__dataclass_fields__) - {"step"}
    return tuple(
        AccuracyResult(step=commit.step, **{name: commit.figures[name] for name in fields})
        for commit in run.commits
        if commit.step.startswith("zero-shot/")
    )


def side_by_side(
    evaluations: Sequence[EvaluationResult],
) -> list[dict[str, EvaluationResult]]:
    """Dense and pruned results together where both were measured on the very same data, and only there."""
    rows: dict[tuple[Any, ...], dict[str, EvaluationResult]] = {}
    for result in evaluations:
        rows.setdefault(result.measured_on, {})[result.which] = result
    return list(rows.values())


def described(result: EvaluationResult) -> str:
    """How a figure was measured, in a few words."""
    return how_measured(result.metric, result.figures, is_partial=result.is_partial)


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


def _block_state(index: int, budget: dict[str, Any], by_name: dict[str, StepCommit], has_refine: bool) -> BlockState:
    pruned, compensated = by_name.get(f"prune-block/{index}"), by_name.get(f"compensate-block/{index}")
    refined = by_name.get(f"refine-block/{index}")
    losses = compensated.figures if compensated else {}
    refine_losses = refined.figures if refined else {}
    outcome = pruned.figures["layers"] if pruned else {}
    finished = refined if has_refine else pruned
    counted = finished.figures.get("weights", {}) if finished else {}
    layers = tuple(
        LayerState(
            layer["name"],
            layer["role"],
            layer["size"],
            layer["num_masked"],
            outcome.get(layer["name"], {}).get("relative_error"),
            counted.get(layer["name"], {}).get("num_masked"),
            counted.get(layer["name"], {}).get("num_other_zeros"),
        )
        for layer in budget["layers"]
    )
    return BlockState(
        block=index,
        state="refined" if refined else "pruned" if pruned else "compensated" if compensated else "waiting",
        size=sum(layer.size for layer in layers),
        num_masked=sum(layer.num_masked for layer in layers),
        num_other_zeros=finished.figures["num_other_zeros"] if finished else None,
        loss_before=losses.get("loss_before"),
        loss_after=losses.get("loss_after"),
        loss_before_aside=losses.get("loss_before_aside"),
        loss_after_aside=losses.get("loss_after_aside"),
        refine_before=refine_losses.get("loss_before"),
        refine_after=refine_losses.get("loss_after"),
        refine_before_aside=refine_losses.get("loss_before_aside"),
        refine_after_aside=refine_losses.get("loss_after_aside"),
        epochs=_epochs(losses),
        kept_epoch=losses.get("kept_epoch"),
        refine_epochs=_epochs(refine_losses),
        refine_kept_epoch=refine_losses.get("kept_epoch"),
        layers=layers,
    )


def _epochs(figures: Mapping[str, Any]) -> tuple[EpochLoss, ...]:
    return tuple(EpochLoss(epoch["trained"], epoch["aside"]) for epoch in figures.get("epoch_losses", ()))
