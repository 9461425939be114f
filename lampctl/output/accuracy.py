"""Tables of zero-shot accuracy, and what `lampctl evaluate MODEL` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.table import Table

from lampctl.output.labels import source_label
from stages.metrics.registry import figure_text, metric_of

if TYPE_CHECKING:
    from pipeline.rundir.records import JsonObject
    from pipeline.runs.model_evaluation import ModelResults

_METRICS = ("acc", "acc_norm")


class Measured(Protocol):
    """One task's figures, whoever measured them."""

    @property
    def task(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_rows_available(self) -> int: ...
    @property
    def is_partial(self) -> bool: ...


def accuracy_table(columns: Mapping[str, Sequence[Measured]]) -> Table:
    """Tasks down, models across, each with acc and acc_norm in percent; the means of what each has below.

    A task that was measured on part of its rows is a line of its own, and says so. Metrics that are no accuracy are
    shown as they are.
    """
    rows: dict[tuple[str, int, int], dict[str, Measured]] = {}
    for title, measured in columns.items():
        for found in measured:
            rows.setdefault((found.task, found.num_rows, found.num_rows_available), {})[title] = found
    names = _metric_names([found for measured in columns.values() for found in measured])
    table = Table("zero-shot", "rows")
    for title in columns:
        for name in names:
            table.add_column(f"{title}\n{name}" if title else name, justify="right")
    for (task, num_rows, num_available), pair in rows.items():
        how_many = (
            f"first {num_rows:,} of {num_available:,} only" if num_rows < num_available else f"all ({num_rows:,})"
        )
        cells = [
            _cell(name, pair[title].metrics.get(name) if title in pair else None) for title in columns for name in names
        ]
        table.add_row(task, how_many, *cells)
    if len(rows) > 1:
        table.add_section()
        is_partial = any(found.is_partial for measured in columns.values() for found in measured)
        means = [_mean(measured, name) for measured in columns.values() for name in names]
        table.add_row("mean", "partial" if is_partial else "", *means)
    return table


@dataclass(frozen=True)
class MeanAccuracy:
    """The mean of a metric over the tasks that have it."""

    mean: float
    num_tasks: int


def means_of(measured: Sequence[Measured]) -> dict[str, MeanAccuracy]:
    """The means of acc and acc_norm, by name; without one that no task has."""
    from stages.metrics.zero_shot import mean_of

    found = {name: mean_of([each.metrics for each in measured], name) for name in _METRICS}
    return {name: MeanAccuracy(*mean) for name, mean in found.items() if mean is not None}


def means_record(measured: Sequence[Measured]) -> JsonObject:
    """The same for printed JSON."""
    return {name: asdict(mean) for name, mean in means_of(measured).items()}


def model_results(figures: ModelResults, as_json: bool) -> None:
    """What was measured of a model that belongs to no run."""
    from lampctl.output.console import console_here

    if as_json:
        record = figures.record()
        print(json.dumps({**record, "means": means_record(figures.accuracies)}, indent=2))
        return
    console = console_here()
    console.print(f"{Path(figures.model).name if figures.source == 'folder' else figures.model}", highlight=False)
    if figures.measured:
        table = Table("measured", "on", "how")
        table.add_column("value", justify="right")
        for found in figures.measured:
            how = found.details.described(is_partial=found.is_partial)
            title, value = metric_of(found.metric).title, figure_text(found.metric, found.value)
            table.add_row(title, source_label(found.source), how, value)
        console.print(table)
    if figures.accuracies:
        console.print(accuracy_table({"": figures.accuracies}))
        for line in mean_notes(figures.accuracies):
            console.print(line, highlight=False)
    if figures.task_files is not None:
        console.print(f"The same by lm_eval: --include_path {figures.task_files}", highlight=False, soft_wrap=True)


def mean_notes(measured: Sequence[Measured]) -> list[str]:
    """What has to be known of a mean: that fewer tasks have acc_norm."""
    means = means_of(measured)
    num_all, num_norm = (means[name].num_tasks if name in means else 0 for name in _METRICS)
    if len(measured) < 2 or not num_norm or num_norm == num_all:
        return []
    return [f"The mean of acc_norm is over the tasks that have it, {num_norm} of {num_all}."]


def _metric_names(measured: Sequence[Measured]) -> list[str]:
    """acc and acc_norm first, then what else there is, without standard errors."""
    found = dict.fromkeys(name for each in measured for name in each.metrics if not name.endswith("_stderr"))
    found = {name: None for name in found if "_stderr, " not in name}
    return [*(name for name in _METRICS if name in found), *(name for name in found if name not in _METRICS)]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if name in _METRICS else f"{value:.4g}"


def _mean(measured: Sequence[Measured], name: str) -> str:
    mean = means_of(measured).get(name)
    return f"{100 * mean.mean:.2f}%" if mean is not None else ""
