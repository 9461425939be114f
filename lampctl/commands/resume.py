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
    max_runtime: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after so long, e.g. 3h30m; none: never. [default: as last used]"),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="How often a long step keeps how far it is. [default: as last used]"),
    ] = None,
    watch_preemption: Annotated[
        str | None, typer.Option(metavar="CLOUD", help="aws, gcp or none. [default: as last used]")
    ] = None,
    preemption_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to ask for that. [default: as last used]")
    ] = None,
    allow_environment_change: Annotated[
        bool | None,
        typer.Option(
            "--allow-environment-change/--refuse-environment-change",
            envvar="LAMPCTL_ALLOW_ENVIRONMENT_CHANGE",
            show_envvar=False,
            help="Go on, too, on another device or with other library versions. [default: as last used]",
        ),
    ] = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Even if somebody else is working on it: the other one stops.")
    ] = False,
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
    free = {
        "scratch_dir": scratch_dir,
        "max_runtime": max_runtime,
        "checkpoint_minutes": checkpoint_minutes,
        "watch_preemption": watch_preemption,
        "preemption_url": preemption_url,
        "allow_environment_change": allow_environment_change,
    }
    directory, config = reopen(place, is_resuming=True, free=free)
    with listening() as listener, stopping(config) as stop:
        listener.attach(directory, config)
        options = ResumeOptions(checks="all" if check_all else "as needed", takeover=takeover)
        resume_run(directory, config, listener, stop, options)
    tables.results([directory], [config], as_json)
