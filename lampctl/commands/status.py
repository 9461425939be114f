"""`lampctl status`: the progress and the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory: a folder, or an address in a bucket. [default: the newest under runs/]",
        ),
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Show every setting and where its value came from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a run's steps, budget and losses per block, its metrics, and the remaining time.

    \b
    lampctl status
    lampctl status runs/opt-2.7b-s80-lamp --json
    lampctl status --settings
    """
    from lampctl.output import tables
    from pipeline.errors import RunNotFound
    from pipeline.rundir.run_directory import find_runs
    from pipeline.runs.lifecycle import reopen
    from pipeline.runs.prepare import RUNS
    from pipeline.runs.status import status as status_of

    place: str | Path | None = run
    if place is None:
        found = find_runs(RUNS)
        if not found:
            raise RunNotFound(f"there are no runs under {RUNS}/; begin one with lampctl run, or name a run directory")
        place = found[0]
    directory, config = reopen(place)
    tables.status(status_of(directory, config), directory.manifest.provenance if settings else None, as_json)
