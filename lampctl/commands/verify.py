"""`lampctl verify`: check every file of a run against its commits."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.engine.verify import Report

_HOW_TO_REPAIR = "lampctl resume RUN makes them again (with --check-all if the run is finished)"


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a folder, or an address in a bucket.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every file and compare its SHA-256, not only its size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check every file of a run against its commits. Names damaged files, and what resume does about each.

    Changes nothing. Exits with 4 if a file that is still needed is damaged.

    \b
    lampctl verify runs/mine
    lampctl verify runs/mine --deep
    """
    from lampctl.output.file_progress import showing_files
    from pipeline.engine.verify import verify as compare
    from pipeline.errors import DamagedData
    from pipeline.runs.lifecycle import reopen
    from pipeline.steps.lamp_plan import steps_of

    directory, config = reopen(run)
    steps = steps_of(directory, config)
    with showing_files(f"checking {directory.label}") as callbacks:

        def advance(done: int, total: int) -> None:
            callbacks.check_stop()
            callbacks.report(done, total, "files")

        report = compare(directory, steps, is_deep=deep, advance=advance)
    if as_json:
        print(json.dumps({"run": directory.label, **asdict(report)}, indent=2))
    else:
        _print_report(report)
    needed = [damage for damage in report.damages if damage.is_needed]
    if needed:
        raise DamagedData(f"{len(needed)} files of {directory.label} are damaged; {_HOW_TO_REPAIR}")


def _print_report(report: Report) -> None:
    from lampctl.output.units import size
    from pipeline.steps.reporting import counted

    how = "match their SHA-256" if report.is_deep else "exist with their sizes (--deep compares their SHA-256)"
    for damage in report.damages:
        print(f"{damage.key} {damage.reason}\n    {damage.payload} of {damage.step}; lampctl resume {damage.remedy}")
    print(f"{report.num_commits} commits, one unbroken chain")
    num_bad = len(report.damages)
    print(f"{report.num_files - num_bad:,} of {report.num_files:,} files ({size(report.num_bytes)}) {how}")
    if report.released:
        print(f"{counted(len(report.released), 'payload')} deleted: no later step needs them")
    if report.leftovers:
        print(f"{counted(len(report.leftovers), 'abandoned attempt')}: lampctl gc deletes them")
