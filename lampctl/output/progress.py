"""Progress of a run on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lampctl.output.labels import step_label
from lampctl.output.units import duration, time_left
from pipeline.steps.run_facts import facts_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from pipeline.config.run_config import RunConfig
    from pipeline.engine.plan import Step
    from pipeline.rundir.records import StepCommit
    from pipeline.rundir.run_directory import RunDirectory
    from pipeline.runs.status import RunStatus, StepState

# In a log, a step that takes longer than this says how far it is, again and again.
_HEARTBEAT_S = 60.0
# Seconds of a step that are measured before its remaining time is estimated.
_WATCHED_S = 5.0


class Pace:
    """Remaining time of a step, estimated from what it has done since it began or was resumed."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def time_left(self, done: int, total: int) -> str:
        """For example "done in about 3 min 20 s"; empty: not known yet. done, total: units of work."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, done  # what a checkpoint had done took no time here
        began, before = self._first
        if now - began < _WATCHED_S or done <= before:
            return ""
        return f"done in about {duration((now - began) / (done - before) * max(total - done, 0))}"


class Heartbeat:
    """Lines for a log that say how far a long step is."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._spoke_at, self._pace = time.monotonic(), Pace()

    def line(self, done: int, total: int, unit: str, figures: Mapping[str, float]) -> str | None:
        """For example "45% of 12,000 passes, loss 0.61, done in about 3 min 20 s"; None: it is too early for a line."""
        left = self._pace.time_left(done, total)
        if time.monotonic() - self._spoke_at < _HEARTBEAT_S:
            return None
        self._spoke_at = time.monotonic()
        return f"{100 * done / max(total, 1):.0f}% of {total:,} {unit}{_described(figures, left)}"


def _described(figures: Mapping[str, float], *more: str) -> str:
    """Figures of a step and further notes, as they are shown behind how far it is."""
    return "".join(f", {part}" for part in (*(f"{name} {value:.4g}" for name, value in figures.items()), *more) if part)


class ProgressListener:
    """Common part of both displays: the run, and the time that the rest will take (`pipeline.engine.job.Listener`)."""

    def __init__(self) -> None:
        self._run: RunDirectory | None = None
        self._config: RunConfig | None = None
        self._said: set[str] = set()
        self._known: tuple[int, RunStatus] | None = None  # the state at this number of commits
        self._num_taken = 0  # steps that were taken over from another run since the last one that was not

    def attach(self, run: RunDirectory, config: RunConfig, what: str | None = None) -> None:
        """The steps to come are of this run. what: what it is; None: named by its method and its sparsity."""
        self._run, self._config, self._known = run, config, None
        state = self._state
        title = f"{what or f'{config.method} {state.goal}'}: {run.label}"
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

    def show(self, line: str) -> None:
        """Display a line."""

    def step_started(self, step: Step, position: int, total: int) -> None: ...

    def step_resumed(self, step: Step) -> None:
        self.show(f"{step_label(step.name)}: resumed from its last checkpoint")

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None: ...

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None: ...

    def _is_taken_over(self, commit: StepCommit) -> bool:
        """Whether a step was taken over by --from-run, and so took no time here. It is counted, to be reported."""
        assert self._config is not None
        is_taken = self._config.from_run is not None and commit.result.get("shared_with") is not None
        self._num_taken += is_taken
        return is_taken

    def _report_taken_over(self) -> None:
        """Report the steps that were taken over before the present one, in a line together."""
        if self._num_taken:
            assert self._config is not None
            self.show(f"{self._num_taken} steps taken over from {self._config.from_run}")
            self._num_taken = 0

    @property
    def _state(self) -> RunStatus:
        """The state of the run, read again after each commit."""
        from pipeline.runs.status import status

        assert self._run is not None
        assert self._config is not None
        num_commits = len(self._run.log)
        if self._known is None or self._known[0] != num_commits:
            self._known = (num_commits, status(self._run, self._config))
        return self._known[1]

    @property
    def _remaining(self) -> str:
        state = self._state
        return time_left(state.remaining_s, state.remaining_until)

    @property
    def _num_blocks(self) -> int:
        assert self._run is not None
        return facts_of(self._run).model.num_blocks

    def _ends_block(self, step: Step) -> bool:
        """Whether a block is done with this step, so that its line can be written."""
        return step.block is not None and step.name == self._steps_of(step.block)[-1].name

    def _steps_of(self, block: int) -> list[StepState]:
        """The steps of a block, in order."""
        return [state for state in self._state.steps if state.block == block]

    def _outcome(self, step: Step) -> str:
        """What a finished step reports, in a few words; the last step of a block reports for all of the block's."""
        if step.block is None or not self._ends_block(step):
            return next(state.headline for state in self._state.steps if state.name == step.name)
        block = self._state.blocks[step.block]
        parts = [state.headline for state in self._steps_of(step.block)]
        if block.num_found is not None:
            parts.insert(0, f"{100 * block.num_found / max(1, block.size):.2f}% masked")
        return ", ".join(part for part in parts if part)


class PlainListener(ProgressListener):
    """One line per block, and one per step that belongs to no block."""

    def __init__(self, console: Console, every_step: bool = False) -> None:
        super().__init__()
        self._console = console
        self._every_step = every_step
        self._heartbeat = Heartbeat()

    def begin(self, title: str) -> None:
        self._print(title)

    def show_warning(self, message: str) -> None:
        self._print(f"warning: {message}")

    def show(self, line: str) -> None:
        self._print(line)

    def step_started(self, step: Step, position: int, total: int) -> None:
        self._heartbeat.begin()

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        self._report_taken_over()
        line = self._heartbeat.line(done, total, unit, figures)
        if line is not None:
            self._print(f"  {step_label(step.name)}: {line}")

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        if self._is_taken_over(commit):
            return
        self._report_taken_over()
        if step.block is not None and not self._ends_block(step) and not self._every_step:
            return  # the line comes when the block is done
        elapsed_s = commit.elapsed_s
        what = step_label(step.name)
        if self._ends_block(step) and not self._every_step:
            assert step.block is not None
            elapsed_s = sum(done.elapsed_s or 0.0 for done in self._steps_of(step.block))
            what = f"block {step.block} of {self._num_blocks}"
        parts = [self._outcome(step), duration(elapsed_s), self._remaining if position + 1 < total else ""]
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
        self._pace = Pace()

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

    def show(self, line: str) -> None:
        self._progress.console.print(f"  {line}", markup=False, highlight=False)

    def step_started(self, step: Step, position: int, total: int) -> None:
        if self._run_bar is None or self._step_bar is None:
            self._run_bar = self._progress.add_task("steps", total=total, note="")
            self._step_bar = self._progress.add_task("", total=None, note="")
        note = "" if step.block is None else f"block {step.block} of {self._num_blocks}"
        notes = [part for part in (note, self._remaining) if part]
        self._progress.update(self._run_bar, completed=position, note=", ".join(notes))
        self._progress.reset(self._step_bar, description=step_label(step.name), note="")
        self._pace = Pace()

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        assert self._step_bar is not None
        self._report_taken_over()
        note = f"{unit}{_described(figures, self._pace.time_left(done, total))}"
        self._progress.update(self._step_bar, completed=done, total=total, note=note)

    def step_finished(self, step: Step, commit: StepCommit, position: int, total: int) -> None:
        assert self._run_bar is not None
        is_taken = self._is_taken_over(commit)
        self._progress.update(
            self._run_bar, completed=position + 1, note=self._remaining if position + 1 < total else ""
        )
        if is_taken:
            return
        self._report_taken_over()
        outcome = self._outcome(step)
        if outcome and (step.block is None or self._ends_block(step)):
            self._progress.console.print(f"  {step_label(step.name)}: {outcome}", highlight=False)


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
