"""The order of the steps for people: which command does a step, and which one has to come first."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.plan import Step, next_steps
from pipeline.errors import StepOrderError
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.registry import STEP_KINDS

_MOST_SHOWN = 6


def command_for(step: Step, run: str) -> str:
    """The command that does a step of a run, which is named as the user names it."""
    command = STEP_KINDS.get(step.kind).command
    if command is None:
        return f"lampctl resume {run}"
    of_block = f" --block {step.block}" if step.block is not None else ""
    return f"lampctl {command} {run}{of_block}"


def require_next(run: RunDirectory, steps: Sequence[Step], wanted: Step) -> None:
    """Raise StepOrderError, naming the command to call first, unless `wanted` is the next step."""
    todo = next_steps(steps, [commit.step for commit in run.commits])
    command = command_for(wanted, run.label)
    if not any(step.name == wanted.name for step in steps):
        absence = STEP_KINDS.get(wanted.kind).absence.format(run=run.label)
        raise StepOrderError(f"{command}: the run has no such step; " + (absence or f"its steps are {_brief(steps)}"))
    if not any(step.name == wanted.name for step in todo):
        rest = f"next is {command_for(todo[0], run.label)}" if todo else "the run is finished"
        raise StepOrderError(f"{command}: this step is already done; {rest}")
    if todo[0].name != wanted.name:
        raise out_of_order(command, todo[0], run)


def out_of_order(command: str, first: Step, run: RunDirectory) -> StepOrderError:
    """The error for a command that comes too early."""
    return StepOrderError(
        f"{command}: this step comes later; call {command_for(first, run.label)} first, or lampctl resume "
        f"{run.label} for all steps in their order"
    )


def _brief(steps: Sequence[Step]) -> str:
    names = [f"{step.kind} --block {step.block}" if step.block is not None else step.kind for step in steps]
    names = list(dict.fromkeys(names))
    return ", ".join(names if len(names) <= _MOST_SHOWN else [*names[:3], "...", *names[-2:]])
