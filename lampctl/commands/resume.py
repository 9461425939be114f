"""`lampctl resume`: go on with a run that was interrupted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def resume(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory: a folder, or an address in a bucket. [default: the newest unfinished under runs/]",
        ),
    ] = None,
    check_all: Annotated[
        bool,
        typer.Option("--check-all", help="Compare every file of a finished run, too, and make damaged ones again."),
    ] = False,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep activations there from now on. [default: as last used in this run]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Go on with an unfinished run, after its last completed step.

    What it needs is checked first; what is damaged or missing is made again, bit for bit.

    \b
    lampctl resume
    lampctl resume runs/opt-2.7b-s80-lamp
    lampctl resume runs/opt-2.7b-s80-lamp --check-all
    lampctl resume s3://bucket/opt-2.7b --scratch-dir /mnt/ssd
    """
    from lampctl import show
    from lampctl.exits import end_now
    from lampctl.progress import listening
    from pipeline.engine import StopRequest
    from pipeline.prepare import RUNS
    from pipeline.session import go_on, newest_unfinished, reopen

    place: str | Path | None = run if run is not None else newest_unfinished()
    if place is None:
        print(f"nothing left to do: every run under {RUNS}/ is finished", file=sys.stderr)
        return
    directory, config = reopen(place, to_go_on=True, scratch_dir=scratch_dir)
    with listening() as listener, StopRequest(end_now) as stop:
        listener.attach(directory, config)
        go_on(directory, config, listener, stop, checks="all" if check_all else "as needed")
    show.results([directory], [config], as_json)
