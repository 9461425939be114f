"""One command per kind of step. They run the same code as `lampctl run`, one step at a time."""

from __future__ import annotations

from typing import Annotated, Any

import typer

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory made by lampctl init or run.")]
Block = Annotated[
    int | None, typer.Option(metavar="I", min=0, help="Number of the block, from 0. [default: the next one]")
]


def calibrate(run: RunPath) -> None:
    """Sample the calibration set.

    \b
    lampctl calibrate runs/mine
    """
    do_step(run, "calibrate")


def capture(run: RunPath) -> None:
    """Embed the calibration set and run the first block on it.

    \b
    lampctl capture runs/mine
    """
    do_step(run, "capture")


def allocate(run: RunPath) -> None:
    """Compute the budget from a pass of the original model, in runs with --budget outliers.

    \b
    lampctl allocate runs/mine
    """
    do_step(run, "allocate")


def prune_block(run: RunPath, block: Block = None) -> None:
    """Prune one block, and compute its output from the biased input.

    \b
    lampctl prune-block runs/mine
    lampctl prune-block runs/mine --block 3
    """
    do_step(run, "prune-block", block)


def refine_block(run: RunPath, block: Block = None) -> None:
    """Train the weights that a pruned block kept, in runs with --refine.

    \b
    lampctl refine-block runs/mine
    """
    do_step(run, "refine-block", block)


def compensate_block(run: RunPath, block: Block = None) -> None:
    """Train one block before it is pruned, to compensate the error of the blocks before it.

    \b
    lampctl compensate-block runs/mine
    lampctl compensate-block runs/mine --block 4
    """
    do_step(run, "compensate-block", block)


def do_step(place: str, kind: str, block: int | None = None) -> None:
    """Do the next step of this kind, or the step of this block, and print the step after it."""
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.engine.plan import Step, next_steps
    from pipeline.engine.runner import require_next
    from pipeline.runs.lifecycle import ResumeOptions, reopen, resume
    from pipeline.steps.lamp_plan import steps_of

    directory, config = reopen(place, is_resuming=True)
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


def _first(steps: Any, todo: Any, kind: str) -> Any:
    """The next step of this kind. If none is left: a done one, or one outside the plan, which is then refused."""
    from pipeline.engine.plan import Step

    for candidates in (todo, tuple(reversed(steps))):
        for step in candidates:
            if step.kind == kind:
                return step
    return Step(kind)
