"""The steps of a run, one command each: the same code as `lampctl run`, one step at a time."""

from __future__ import annotations

from typing import Annotated, Any

import typer

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory made by lampctl init or run.")]
Block = Annotated[
    int | None, typer.Option(metavar="I", min=0, help="Which block, from 0. [default: the one whose turn it is]")
]


def calibrate(run: RunPath) -> None:
    """Draw the calibration set.

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
    """Find the budget by a first pass of the original model, in runs with --budget outliers.

    \b
    lampctl allocate runs/mine
    """
    do_step(run, "allocate")


def prune_block(run: RunPath, block: Block = None) -> None:
    """Prune one block and run the biased stream through it.

    \b
    lampctl prune-block runs/mine
    lampctl prune-block runs/mine --block 3
    """
    do_step(run, "prune-block", block)


def refine_block(run: RunPath, block: Block = None) -> None:
    """Train a pruned block's kept weights, in runs with --refine.

    \b
    lampctl refine-block runs/mine
    """
    do_step(run, "refine-block", block)


def compensate_block(run: RunPath, block: Block = None) -> None:
    """Train one block, still dense, to make up for the error of those before it.

    \b
    lampctl compensate-block runs/mine
    lampctl compensate-block runs/mine --block 4
    """
    do_step(run, "compensate-block", block)


def evaluate(
    run: RunPath,
    sources: Annotated[
        str | None,
        typer.Option("--evaluate", metavar="SRC,...", help="Which sources. [default: as last used in this run]"),
    ] = None,
    eval_seqlen: Annotated[
        int | None, typer.Option(metavar="T", help="Tokens per window. [default: as last used in this run]")
    ] = None,
    eval_max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N tokens. [default: as last used in this run]")
    ] = None,
    eval_points: Annotated[
        str | None, typer.Option(metavar="WHERE", help="Where the points are. [default: as last used in this run]")
    ] = None,
    eval_max_images: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N images. [default: as last used in this run]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure perplexity, or single-point IoU, of the exported model and of the original.

    What is given is kept for the next evaluation of this run; all figures are in lampctl status.

    \b
    lampctl evaluate runs/mine
    lampctl evaluate runs/mine --evaluate pydocs,text:notes.txt --eval-seqlen 512
    lampctl evaluate runs/sam --evaluate coco:val2017 --eval-points random
    """
    from lampctl import show
    from lampctl.progress import listening
    from lampctl.stopping import stopping
    from pipeline.session import change_evaluation, go_on, reopen, require_exported

    directory, config = reopen(run, to_go_on=True)
    require_exported(directory, config)
    changes = {
        "eval_seqlen": eval_seqlen,
        "eval_max_tokens": eval_max_tokens,
        "eval_points": eval_points,
        "eval_max_images": eval_max_images,
    }
    config = change_evaluation(directory, config, sources, changes)
    with listening() as listener, stopping(config) as stop:
        listener.attach(directory, config)
        go_on(directory, config, listener, stop)
    show.results([directory], [config], as_json)


def do_step(place: str, kind: str, block: int | None = None) -> None:
    """Do the next step of that kind, or of that block, and say what comes then."""
    from lampctl import show
    from lampctl.progress import listening
    from lampctl.stopping import stopping
    from pipeline.engine import require_next
    from pipeline.plan import Step, next_steps
    from pipeline.session import go_on, reopen, steps_of

    directory, config = reopen(place, to_go_on=True)
    steps, _ = steps_of(directory, config)
    if block is not None:
        wanted = Step(kind, block)
    else:
        todo = next_steps(steps, [commit.step for commit in directory.commits])
        wanted = _first(steps, todo, kind)
    require_next(directory, steps, wanted)
    with listening(every_step=True) as listener, stopping(config) as stop:
        listener.attach(directory, config)
        go_on(directory, config, listener, stop, until=lambda step: True, checks="sizes")
    show.next_step(directory, config)


def _first(steps: Any, todo: Any, kind: str) -> Any:
    """The step of that kind whose turn comes first; a done one, or one that never comes, if there is none."""
    from pipeline.plan import Step

    for candidates in (todo, tuple(reversed(steps))):
        for step in candidates:
            if step.kind == kind:
                return step
    return Step(kind)
