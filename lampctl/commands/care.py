"""`lampctl verify` checks what a run has stored; `lampctl gc` deletes what nobody needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.engine.verify import Report

_HOW_TO_MEND = "lampctl resume RUN makes them again (with --check-all, if the run is finished)"

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a folder, or an address in a bucket.")]


def verify(
    run: RunPath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every file and compare its SHA-256, not only its size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check every file of a run against its commits: name what is damaged, and what resume will do about it.

    Changes nothing. Exits with 4 if something that is still needed is damaged.

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
        raise DamagedData(f"{len(needed)} files of {directory.label} are damaged; {_HOW_TO_MEND}")


def gc(
    run: RunPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Delete what a run does not need: what crashes left behind, and activations that nobody will read again.

    A run does this by itself as it goes on; what it needs is never touched.

    \b
    lampctl gc runs/mine --dry-run
    lampctl gc runs/mine
    """
    from lampctl.output.units import size
    from pipeline.runs.lifecycle import collect_garbage, reopen

    directory, config = reopen(run)
    found = collect_garbage(directory, config, is_dry_run=dry_run)
    if as_json:
        print(json.dumps({"run": directory.label, "is_dry_run": dry_run, "deleted": found}, indent=2))
        return
    for key, num_bytes in found.items():
        print(f"{key}  {size(num_bytes)}")
    verb = "would be deleted" if dry_run else "deleted"
    print(f"{size(sum(found.values()))} {verb}" if found else "nothing to delete")


def _print_report(report: Report) -> None:
    from lampctl.output.units import size

    how = "compared with their sha256" if report.is_deep else "there with their sizes (--deep reads them, too)"
    for damage in report.damages:
        print(f"{damage.key} {damage.reason}\n    {damage.payload} of {damage.step}; lampctl resume {damage.remedy}")
    print(f"{report.num_commits} commits, one unbroken chain")
    num_bad = len(report.damages)
    print(f"{report.num_files - num_bad:,} of {report.num_files:,} files ({size(report.num_bytes)}) {how}")
    if report.released:
        print(f"{len(report.released)} payloads released, as nobody reads them again")
    if report.leftovers:
        print(f"{len(report.leftovers)} attempts that came to nothing: lampctl gc deletes them")
