"""Progress of a run on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lampctl.output.units import duration
from pipeline.steps.results import (
    CalibrateResult,
    CompensateResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
    RefineResult,
    TrainingRecord,
    ZeroShotResult,
    budget_of_run,
)
from pipeline.steps.run_facts import facts_of
from stages.metrics.registry import figure_text, metric_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from pipeline.config.run_config import RunConfig
    from pipeline.engine.plan import Step
    from pipeline.rundir.records import StepCommit
    from pipeline.rundir.run_directory import RunDirectory

# In a log, a step that takes longer than this says so.
_HEARTBEAT_S = 300.0


class ProgressListener:
    """Common part of both displays: the run, and the time that the rest will take (`pipeline.engine.job.Listener`)."""

    def __init__(self) -> None:
        self._run: RunDirectory | None = None
        self._config: RunConfig | None = None
        self._said: set[str] = set()

    def attach(self, run: RunDirectory, config: RunConfig) -> None:
        """The steps to come are of this run."""
        from pipeline.runs.status import status

        self._run, self._config = run, config
        state = status(run, config)
        title = f"{config.method} {config.goal}: {run.label}"
        if state.is_finished:
            title += " (finished)"
        elif state.num_done:
            title += f" (resumed: {state.num_done} of {len(state.steps)} steps are done)"
        self.begin(title)

    def begin(self, title: str) -> None:
        """A run begins, or is resumed."""

    def warn(self, message: str) -> None:
        """Show a warning to the user; the same text only once."""
        if message not in self._said:
            self._said.add(message)
            self.show_warning(message)

    def show_warning(self, message: str) -> None:
        """Display a warning."""

    def step_started(self, step: Step, position: int, total: int) -> None: ...

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None: ...

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None: ...

    @property
    def _remaining(self) -> str:
        from pipeline.runs.status import status

        assert self._run is not None
        assert self._config is not None
        seconds = status(self._run, self._config).remaining_s
        return "" if seconds is None else f"about {duration(seconds)} left"

    @property
    def _num_blocks(self) -> int:
        assert self._run is not None
        return facts_of(self._run).model.num_blocks

    def _ends_block(self, step: Step) -> bool:
        """Whether a block is done with this step, so that its line can be written."""
        assert self._config is not None
        return step.kind == ("refine-block" if self._config.refine else "prune-block")

    def _outcome(self, step: Step, commit: StepCommit) -> str:
        """What a finished step reports, in a few words."""
        if self._ends_block(step):
            return self._block_outcome(step, commit)
        if step.kind == "compensate-block":
            return _losses(commit.result_as(CompensateResult).training)
        if step.kind == "evaluate":
            measured = commit.result_as(EvaluateResult)
            partial = " (partial)" if measured.is_partial else ""
            shown = "infinite" if measured.value is None else figure_text(measured.metric, measured.value)
            return f"{metric_of(measured.metric).title} {shown}{partial}"
        if step.kind == "zero-shot":
            found = commit.result_as(ZeroShotResult)
            accuracies = [
                f"{name} {100 * value:.2f}%"
                for name, value in found.metrics.items()
                if name in ("acc", "acc_norm") and value is not None
            ]
            return ", ".join(accuracies) + (" (partial)" if found.is_partial else "")
        if step.kind == "calibrate":
            samples = commit.result_as(CalibrateResult)
            num_skipped = sum(samples.skipped.values())
            note = f", {num_skipped} passed over" if num_skipped else ""
            return f"{samples.amount:,} {samples.unit} of {samples.source}{note}"
        if step.kind == "export":
            exported = commit.result_as(ExportResult)
            return f"{exported.num_masked:,} of {exported.num_prunable:,} weights masked"
        return ""

    def _block_outcome(self, step: Step, commit: StepCommit) -> str:
        """The same for the last step of a block: its masked weights, and the losses of its trainings."""
        assert self._run is not None
        assert step.block is not None
        refined = commit.result_as(RefineResult) if step.kind == "refine-block" else None
        finished = refined.finished if refined else commit.result_as(PruneResult).finished
        assert finished is not None
        masked = finished.num_masked / max(1, budget_of_run(self._run)[step.block].size)
        compensated = self._run.commit_for(f"compensate-block/{step.block}")
        parts = [f"{100 * masked:.2f}% masked"]
        parts += [_losses(compensated.result_as(CompensateResult).training)] if compensated else []
        parts += [f"refined {_losses(refined.training)}"] if refined else []
        return ", ".join(parts)


class PlainListener(ProgressListener):
    """One line per block, and one per step that belongs to no block."""

    def __init__(self, console: Console, every_step: bool = False) -> None:
        super().__init__()
        self._console = console
        self._every_step = every_step
        self._spoke_at = 0.0

    def begin(self, title: str) -> None:
        self._print(title)

    def show_warning(self, message: str) -> None:
        self._print(f"warning: {message}")

    def step_started(self, step: Step, position: int, total: int) -> None:
        self._spoke_at = time.monotonic()

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        if time.monotonic() - self._spoke_at > _HEARTBEAT_S:
            self._spoke_at = time.monotonic()
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._print(f"  {_label(step)}: {done}/{total} {unit}{', ' if shown else ''}{shown}")

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        if step.block is not None and not self._ends_block(step) and not self._every_step:
            return  # the line comes when the block is done
        elapsed_s = commit.elapsed_s
        what = _label(step)
        if self._ends_block(step) and not self._every_step:
            assert self._run is not None
            names = {f"{kind}/{step.block}" for kind in ("compensate-block", "prune-block", "refine-block")}
            elapsed_s = sum(done.elapsed_s for done in self._run.commits if done.step in names)
            what = f"block {step.block} of {self._num_blocks}"
        parts = [self._outcome(step, commit), duration(elapsed_s), self._remaining if position + 1 < total else ""]
        self._print(f"[{position + 1}/{total}] {what}: " + ", ".join(part for part in parts if part))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


class LiveListener(ProgressListener):
    """Two bars: the run's steps, and the step that is running with its latest figures."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        super().__init__()
        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._run_bar: TaskID | None = None
        self._step_bar: TaskID | None = None

    def __enter__(self) -> LiveListener:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        for bar in (self._run_bar, self._step_bar):
            if bar is not None:
                self._progress.remove_task(bar)
        self._run_bar = self._step_bar = None
        self._progress.console.print(title, highlight=False)

    def show_warning(self, message: str) -> None:
        self._progress.console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def step_started(self, step: Step, position: int, total: int) -> None:
        if self._run_bar is None or self._step_bar is None:
            self._run_bar = self._progress.add_task("steps", total=total, note="")
            self._step_bar = self._progress.add_task("", total=None, note="")
        note = "" if step.block is None else f"block {step.block} of {self._num_blocks}"
        notes = [part for part in (note, self._remaining) if part]
        self._progress.update(self._run_bar, completed=position, note=", ".join(notes))
        self._progress.reset(self._step_bar, description=_label(step), note="")

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        assert self._step_bar is not None
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        note = f"{unit}{', ' if shown else ''}{shown}"
        self._progress.update(self._step_bar, completed=done, total=total, note=note)

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        assert self._run_bar is not None
        self._progress.update(
            self._run_bar, completed=position + 1, note=self._remaining if position + 1 < total else ""
        )
        outcome = self._outcome(step, commit)
        if outcome and (step.block is None or self._ends_block(step)):
            self._progress.console.print(f"  {_label(step)}: {outcome}", highlight=False)


@contextmanager
def listening(every_step: bool = False) -> Iterator[Any]:
    """The display that suits where stderr goes. every_step: a log gets a line per step, not per block."""
    from rich.console import Console

    console = Console(stderr=True, markup=False)  # paths may hold brackets
    if console.is_terminal:
        with LiveListener(console) as listener:
            yield listener
    else:
        yield PlainListener(console, every_step)


def _label(step: Step) -> str:
    """The step's name with local files by their names: their whole paths do not fit a line."""
    return re.sub(r"([:@])/.*/", r"\1", step.name)


def _losses(training: TrainingRecord) -> str:
    before, after = training.before.trained, training.after.trained
    if training.before.held_out is not None:
        before, after = training.before.held_out, training.after.held_out
    if not training.kept_epoch:
        return f"loss {_loss(before)} (no epoch improved it; kept the weights from before)"
    return f"loss {_loss(before)} -> {_loss(after)}"


def _loss(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
