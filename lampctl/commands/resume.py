"""`lampctl resume`: go on with a run that was interrupted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def resume(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run directory. [default: the newest unfinished under runs/]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Go on with an unfinished run, after its last completed step.

    \b
    lampctl resume
    lampctl resume runs/opt-2.7b-s80-lamp
    """
    from lampctl import show
    from lampctl.progress import listening
    from pipeline.engine import StopRequest
    from pipeline.prepare import RUNS
    from pipeline.session import go_on, newest_unfinished, reopen

    run = run if run is not None else newest_unfinished()
    if run is None:
        print(f"nothing left to do: every run under {RUNS}/ is finished", file=sys.stderr)
        return
    directory, config = reopen(run)
    with listening() as listener, StopRequest() as stop:
        listener.attach(directory, config)
        go_on(directory, config, listener, stop)
    show.results([directory], [config], as_json)
