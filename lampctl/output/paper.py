"""Tables of the paper on a terminal, our numbers beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

from lampctl.output.units import duration, size
from stages.pruners.registry import method_title

if TYPE_CHECKING:
    from pipeline.paper.estimates import Estimate
    from pipeline.paper.reproduce import Cell
    from pipeline.paper.tables import Table

_UNITS = {"perplexity": "perplexity", "iou": "IoU, %", "accuracy": "accuracy, %", "gpu_memory_gb": "GPU memory, GB"}


def show_cells(table: Table, columns: Sequence[str], cells: Sequence[Cell], failed: Sequence[str]) -> None:
    """Print one table per model: methods by the paper's columns, our number above the published one."""
    console = _console()
    for model in dict.fromkeys(cell.model for cell in cells):
        shown = RichTable(title=f"{table.name}: {model}, {_UNITS[table.metric]}", title_justify="left")
        has_datasets = len(table.datasets) > 1
        if has_datasets:
            shown.add_column("on")
        shown.add_column("method")
        for column in columns:
            shown.add_column(column or "-", justify="right")
        by_key = {(cell.dataset, cell.method, cell.strategy): cell for cell in cells if cell.model == model}
        for dataset in table.datasets:
            for method in table.methods:
                found = [by_key[dataset, method, column] for column in columns]
                texts = [f"{_number(cell)}\n{_published(cell, table)}" for cell in found]
                shown.add_row(*([dataset] if has_datasets else []), method_title(method), *texts)
            shown.add_section()
        console.print(shown)
    note = "drawn in the paper, not tabled" if table.is_figure else "in brackets as published"
    console.print(f"Ours above, {note}; - missing, x cannot be done, ! failed.", highlight=False)
    for line in failed:
        console.print(f"failed: {line}", soft_wrap=True, highlight=False)


def show_plan(table: Table, estimates: Mapping[str, Estimate], device: str, rate: float) -> None:
    """Print the estimated cost of each model."""
    console = _console()
    shown = RichTable(title=f"{table.name}: {table.title}", title_justify="left")
    shown.add_column("model")
    for title in ("runs", "time", "disk", "download"):
        shown.add_column(title, justify="right")
    for model, found in estimates.items():
        download = size(found.download_bytes) if found.download_bytes else "-"
        shown.add_row(model, str(found.num_runs), duration(found.seconds), size(found.disk_bytes), download)
    console.print(shown)
    console.print(
        f"Estimated for {device}, whose matrix products were just measured at {rate / 1e12:.2f} TFLOP/s; evaluation "
        "and the pruners' own sweeps come on top.",
        highlight=False,
        soft_wrap=True,
    )


def _number(cell: Cell) -> str:
    if cell.ours is not None:
        return f"{cell.ours:,.2f}"
    return {"impossible": "x", "failed": "!"}.get(cell.state, "-")


def _published(cell: Cell, table: Table) -> str:
    return "" if table.is_figure else "(-)" if cell.published is None else f"({cell.published:,g})"


def _console() -> Console:
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=160, markup=False)
