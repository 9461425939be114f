"""`lampctl gc`: delete what a run no longer needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def gc(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a folder, or an address in a bucket.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Delete what a run does not need: abandoned attempts, and activations that no later step reads.

    A run does this by itself while it runs. What it still needs is never deleted.

    \b
    lampctl gc runs/mine --dry-run
    lampctl gc runs/mine
    """
    from lampctl.output.units import size
    from pipeline.runs.garbage import collect_garbage
    from pipeline.runs.lifecycle import reopen

    directory, config = reopen(run)
    found = collect_garbage(directory, config, is_dry_run=dry_run)
    if as_json:
        print(json.dumps({"run": directory.label, "is_dry_run": dry_run, "deleted": found}, indent=2))
        return
    for key, num_bytes in found.items():
        print(f"{key}  {size(num_bytes)}")
    verb = "would be deleted" if dry_run else "deleted"
    print(f"{size(sum(found.values()))} {verb}" if found else "nothing to delete")
