"""`lampctl reproduce`: a table or figure of the paper, ours beside what was published."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lampctl.cli.options import Chosen, with_request, with_settings

if TYPE_CHECKING:
    from pipeline.config.gather import Gathered
    from pipeline.paper.estimates import Estimate
    from pipeline.paper.tables import Table

# Settings that the table fixes.
_TABLES_OWN = ("model", "sparsity", "pattern", "bits", "group_size", "method", "budget", "budget_spread", "revision")


@dataclass(frozen=True)
class Request:
    """The part of a table that the user wants, as text."""

    table: Annotated[str, typer.Argument(metavar="TABLE", help="table1 to table9, or fig3 to fig8.")]
    models: Annotated[
        str | None,
        typer.Option(metavar="MODEL,...", help="Other models, or some of the paper's. [default: all of the table's]"),
    ] = None
    sparsities: Annotated[
        str | None,
        typer.Option(metavar="S,...", help="Some of the columns: 0.5, 70%, 2:4+int4. [default: all of the table's]"),
    ] = None
    methods: Annotated[
        str | None, typer.Option(metavar="METHOD,...", help="Some of the methods. [default: all of the table's]")
    ] = None

    def cells(self) -> Cells:
        """What is wanted, checked. Raises ConfigError for a name that the paper does not have."""
        from pipeline.paper.tables import require_columns, require_methods, table_named

        table = require_methods(table_named(self.table), _split(self.methods))
        return Cells(table, _split(self.models) or table.models, require_columns(table, _split(self.sparsities)))


@dataclass(frozen=True)
class Cells:
    """Models and columns of a table; the table has only the methods that are wanted."""

    table: Table
    models: tuple[str, ...]
    columns: tuple[str, ...]


@with_settings(without=_TABLES_OWN)
@with_request(Request)
def reproduce(
    chosen: Chosen,
    request: Request,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of the runs. Tables 1 and 2 share runs, as do 4 and 5.")
    ] = "reproductions",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the cost: runs, hours, disk, downloads.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Do the runs of a table of the paper, and print its cells beside the published ones.

    Every cell is a run with the paper's settings (--preset paper) and the flags given here. The same command continues
    where it stopped. A failed run is reported and the others continue (exit 7). Tables about SAM need images:
    --calibration and --evaluate.

    \b
    lampctl reproduce table1 --dry-run
    lampctl reproduce table1 --models opt-125m --sparsities 0.5,0.7
    lampctl reproduce table4 --models sam-vit-b --calibration sa1b:sa_000001 --evaluate sa1b:sa_000003
    lampctl reproduce table1 --models smollm2-135m --calibration text:train.txt --evaluate wikitext2:wiki.test.raw
    """
    wanted = request.cells()
    gathered = _gathered(chosen, wanted.table, wanted.models[0])
    if dry_run:
        _plan(wanted, gathered, out, as_json)
        return
    _do(wanted, gathered, out, as_json)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _gathered(chosen: Chosen, table: Table, model: str) -> Gathered:
    """The settings that all runs share: the paper's preset, the table's data sets, and what was given."""
    from pipeline.config.adjust import with_absolute_paths

    chosen.preset = chosen.preset or "paper"
    flags = chosen.flags
    flags["model"] = model
    if table.metric == "perplexity":
        # Both texts at once: tables 1 and 2 share their runs.
        flags.setdefault("evaluate", ("wikitext2", "ptb"))
    elif table.metric != "iou":
        flags.setdefault("evaluate", ())
    if table.metric == "accuracy":
        flags.setdefault("tasks", "zero-shot")
    flags.setdefault("evaluate_dense", False)
    if table.metric == "iou":
        flags.setdefault("evaluate", ())  # the preset's are texts
    return with_absolute_paths(chosen.gather())


def _do(wanted: Cells, gathered: Gathered, out: str, as_json: bool) -> None:
    from lampctl.cli.exit_codes import SOME_FAILED
    from lampctl.cli.stop_sources import stopping
    from lampctl.output.paper import show_cells
    from lampctl.output.progress import listening
    from pipeline.paper.reproduce import cells_of, require_fitting, sweep_for
    from stages.models.registry import open_model
    from stages.models.resolve import resolve

    table = wanted.table
    for model in wanted.models:
        # Check that all models open and fit the table before hours are spent on the first.
        require_fitting(table, gathered, open_model(resolve(model)).task, model)
    cells, failed = [], []
    with listening() as listener, stopping(gathered.values) as stop:
        for model in wanted.models:
            sweep = sweep_for(table, model, gathered, wanted.columns, out)
            for state in sweep.run(listener.attach, listener, stop):
                if state.error is not None:
                    failed.append(f"{model}, {state.trial.name}: {state.error}")
            cells += cells_of(table, model, wanted.columns, sweep.states())
    if as_json:
        print(json.dumps({"table": table.name, "cells": [asdict(cell) for cell in cells], "failed": failed}, indent=2))
    else:
        show_cells(table, wanted.columns, cells, failed)
    if failed:
        raise typer.Exit(SOME_FAILED)


def _plan(wanted: Cells, gathered: Gathered, out: str, as_json: bool) -> None:
    from lampctl.output.paper import show_cells, show_plan
    from pipeline.paper.estimates import best_rate, scale_of
    from pipeline.paper.reproduce import cells_of, planned
    from stages.machine import device

    table = wanted.table
    scales = {model: scale_of(model) for model in wanted.models}
    choices = device.choose(gathered.values.device, gathered.values.dtype, gathered.values.threads)
    device.apply(choices)
    rate = best_rate(choices.torch_device)
    estimates: dict[str, Estimate] = {}
    cells = []
    for model in wanted.models:
        states, estimate = planned(table, model, gathered, wanted.columns, out, scales[model], rate)
        estimates[model] = estimate
        cells += cells_of(table, model, wanted.columns, states)
    if as_json:
        plan = {model: asdict(found) for model, found in estimates.items()}
        record = {"table": table.name, "flops_per_s": rate, "plan": plan, "cells": [asdict(cell) for cell in cells]}
        print(json.dumps(record, indent=2))
        return
    show_plan(table, estimates, choices.device_name, rate)
    show_cells(table, wanted.columns, cells, [])
