"""`lampctl resume`: continue an interrupted run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lampctl.cli.options import with_changes
from pipeline.config.declarations import GivenSettings


@with_changes(
    "scratch_dir",
    "max_runtime",
    "checkpoint_minutes",
    "watch_preemption",
    "preemption_url",
    "allow_environment_change",
    environment=("allow_environment_change",),
)
def resume(
    changes: GivenSettings,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory: a folder, or an address in a bucket. [default: the newest unfinished under runs/]",
        ),
    ] = None,
    check_all: Annotated[
        bool,
        typer.Option("--check-all", help="Check every file of a finished run too, and recompute damaged ones."),
    ] = False,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take over a run that another process works on: that process stops.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Continue an unfinished run after its last completed step.

    Checks the data that the next steps need first. Damaged or missing data is recomputed, bit for bit.

    \b
    lampctl resume
    lampctl resume runs/opt-2.7b-s80-lamp
    lampctl resume runs/opt-2.7b-s80-lamp --check-all
    lampctl resume s3://bucket/opt-2.7b --scratch-dir /mnt/ssd
    """
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.runs.lifecycle import ResumeOptions, newest_unfinished, reopen
    from pipeline.runs.lifecycle import resume as resume_run
    from pipeline.runs.prepare import RUNS

    place: str | Path | None = run if run is not None else newest_unfinished()
    if place is None:
        print(f"nothing left to do: every run under {RUNS}/ is finished", file=sys.stderr)
        return
    directory, config = reopen(place, is_resuming=True, runtime=changes)
    with listening() as listener, stopping(config) as stop:
        listener.attach(directory, config)
        options = ResumeOptions(checks="all" if check_all else "as needed", takeover=takeover)
        resume_run(directory, config, listener, stop, options)
    tables.results([directory], [config], as_json)
