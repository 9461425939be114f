"""The commands of the kinds of steps. They run the same code as `lampctl run`, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lampctl.cli.options import with_changes
from pipeline.config.declarations import GivenSettings
from pipeline.steps.registry import STEP_KINDS
from stages.errors import UsageError

if TYPE_CHECKING:
    from pipeline.engine.plan import Step

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory made by lampctl init or run.")]
Block = Annotated[
    int | None, typer.Option(metavar="I", min=0, help="Number of the block, from 0. [default: the next one]")
]


def command_of(name: str) -> Callable[..., None]:
    """The command that does the next step of a kind. Raises UsageError for a kind that has none."""
    kind = STEP_KINDS.get(name)
    if kind.command != name:
        raise UsageError(f"the step kind {name} has no command of its own")

    def next_step(changes: GivenSettings, run: RunPath) -> None:
        do_step(run, name, changes)

    def step_of_block(changes: GivenSettings, run: RunPath, block: Block = None) -> None:
        do_step(run, name, changes, block)

    command: Callable[..., None] = step_of_block if kind.is_per_block else next_step
    example = f"\n\x08\nlampctl {name} runs/mine"
    of_block = f"\nlampctl {name} runs/mine --block 3" if kind.is_per_block else ""
    command.__doc__ = f"{kind.help}\n{example}{of_block}\n"
    allowing = with_changes("allow_environment_change", environment=("allow_environment_change",))
    found: Callable[..., None] = allowing(command)
    return found


def do_step(place: str, kind: str, changes: GivenSettings, block: int | None = None) -> None:
    """Do the next step of this kind, or the step of this block, and print the step after it.

    changes: runtime settings from now on.
    """
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.engine.plan import Step, next_steps
    from pipeline.runs.lifecycle import ResumeOptions, reopen, resume
    from pipeline.steps.lamp_plan import steps_of
    from pipeline.steps.order import require_next

    directory, config = reopen(place, is_resuming=True, runtime=changes)
    steps = steps_of(directory, config)
    if block is not None:
        wanted = Step(kind, block)
    else:
        todo = next_steps(steps, [commit.step for commit in directory.commits])
        wanted = _first(steps, todo, kind)
    require_next(directory, steps, wanted)
    with listening(every_step=True) as listener, stopping(config) as stop:
        listener.attach(directory, config)
        resume(directory, config, listener, stop, ResumeOptions(until=lambda step: True, checks="sizes"))
    tables.next_step(directory, config)


def _first(steps: Sequence[Step], todo: Sequence[Step], kind: str) -> Step:
    """The next step of this kind. If none is left: a done one, or one outside the plan, which is then refused."""
    from pipeline.engine.plan import Step

    for candidates in (todo, tuple(reversed(steps))):
        for step in candidates:
            if step.kind == kind:
                return step
    return Step(kind)
