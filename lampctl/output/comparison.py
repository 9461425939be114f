"""Comparison of runs and models: one row each, every metric with its difference from the first row."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lampctl.output.labels import measured_label, source_label
from lampctl.output.units import duration, size
from pipeline.runs.comparison import ModelSummary
from pipeline.runs.status import EvaluationResult, MeasuredOn
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.reporting import counted
from stages.metrics.registry import figure_text, metric_of
from stages.pruners.registry import method_title

Unit = Literal["share", "bytes", "seconds", "loss"]


@dataclass(frozen=True)
class Column:
    """One metric or size that rows may have."""

    key: str  # name in JSON and CSV
    title: str
    unit: Unit | str  # a unit, or the name of the metric

    def shown(self, value: float | None) -> str:
        """A value as text."""
        show: dict[str, Callable[[float], str]] = {
            "share": lambda v: f"{100 * v:.4f}%",
            "bytes": size,
            "seconds": duration,
            "loss": lambda v: f"{v:.4g}" if math.isfinite(v) else "infinite",
        }
        if self.unit not in show:
            return figure_text(self.unit, value)
        return "-" if value is None else show[self.unit](value)

    def shown_delta(self, value: float | None, first: float | None) -> str:
        """Difference from the first row as text; empty if one of them is unknown."""
        if value is None or first is None or math.isinf(value) or math.isinf(first):
            return ""
        if self.unit == "share":
            return f"{100 * (value - first):+.2f} pp"
        if self.unit not in get_args(Unit) and metric_of(self.unit).higher_is_better:  # a share, such as IoU
            return f"{value - first:+.{metric_of(self.unit).digits}f}"
        return f"{100 * (value / first - 1):+.1f}%" if first else ""


@dataclass(frozen=True)
class Row:
    """One run or model, or the dense original of a run.

    Attributes:
        label: Folder or address; of an original that was not given itself, the name of the model.
        name: The end of the label that tells the rows apart: the name of the run.
        base: The model that was pruned, or the folder itself.
        method: Name of the method; None: not known.
        goal: Sparsity goal as text.
        is_original: Whether it is the model that a run of the table has pruned.
        steps_left: Steps that a run has not done yet.
        values: By the column's key. Unknown values are missing; infinite after an overflow.
    """

    label: str
    name: str
    base: str
    method: str | None
    goal: str | None
    is_original: bool
    steps_left: int
    values: dict[str, float]

    @property
    def what(self) -> str:
        """Method and sparsity goal as text, and whether the run is unfinished."""
        if self.is_original:
            return "dense"
        what = "-" if self.method is None else f"{method_title(self.method)} {self.goal}"
        return f"{what}, unfinished" if self.steps_left else what

    @property
    def model_name(self) -> str:
        """The name of the model: its folder's name, or its name on the hub."""
        return Path(self.base).name if Path(self.base).is_absolute() else self.base


@dataclass(frozen=True)
class Comparison:
    """The table: the requested rows in order, then the dense originals that runs have measured."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def delta(self, row: Row, column: Column) -> float | None:
        """The row's value minus the first row's; None unless both are known and finite."""
        value, first = row.values.get(column.key), self.rows[0].values.get(column.key)
        if value is None or first is None or not math.isfinite(value - first):
            return None
        return value - first

    def cell(self, row: Row, column: Column) -> str:
        """The value and its difference from the first row as text."""
        value = row.values.get(column.key)
        shown = column.shown(value)
        if row is self.rows[0]:
            return shown
        delta = column.shown_delta(value, self.rows[0].values.get(column.key))
        return f"{shown} ({delta})" if delta else shown


_FIXED = (
    (Column("sparsity", "sparsity", "share"), lambda s: s.sparsity),
    (Column("dense_bytes", "size", "bytes"), lambda s: s.dense_bytes),
    (Column("packed_bytes", "packed", "bytes"), lambda s: s.packed_bytes),
    (Column("pruning_s", "pruning time", "seconds"), lambda s: s.pruning_s),
    (Column("peak_memory_bytes", "peak memory", "bytes"), lambda s: s.peak_memory_bytes),
    (Column("peak_device_bytes", "peak GPU memory", "bytes"), lambda s: s.peak_device_bytes),
)


def compare(summaries: Sequence[ModelSummary]) -> Comparison:
    """Build the table. Columns without any value are left out.

    Perplexities share a column only if they were measured on the same number of tokens and the same windows. Those of
    two tokenizers cannot be compared and get a column each. So do end losses on other samples.
    """
    measured = _measured_columns([result for summary in summaries for result in summary.evaluations])
    originals: dict[str, dict[str, float]] = {}
    for summary in summaries:
        for result in summary.evaluations:
            if result.which == "dense":
                originals.setdefault(summary.base, {})[measured[result.measured_on].key] = _value(result)
    losses = _loss_columns([summary.end_loss for summary in summaries if summary.end_loss is not None])
    names = _distinct_names([summary.label for summary in summaries])
    rows = [
        _row(summary, name, measured, losses, None if summary.method else originals.pop(summary.base, None))
        for summary, name in zip(summaries, names, strict=True)
    ]
    rows += [
        Row(Path(base).name, Path(base).name, base, None, None, True, 0, values) for base, values in originals.items()
    ]
    columns = (*dict.fromkeys(measured.values()), *losses.values(), *(column for column, _ in _FIXED))
    known = {key for row in rows for key in row.values}
    return Comparison(tuple(column for column in columns if column.key in known), tuple(rows))


def _distinct_names(labels: Sequence[str]) -> list[str]:
    """The shortest ends of these paths that tell them apart, whole names of folders only."""
    parts = [[part for part in label.split("/") if part] for label in labels]
    deepest = max(map(len, parts), default=0)
    for depth in range(1, deepest + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(labels)):
            return names
    return list(labels)


def _row(
    summary: ModelSummary,
    name: str,
    measured: dict[MeasuredOn, Column],
    losses: dict[tuple[str, str], Column],
    as_original: dict[str, float] | None,
) -> Row:
    """The row of one summary. as_original: what runs measured of it, if it is the original model of one."""
    is_original = as_original is not None
    values = dict(as_original or {})
    values |= {measured[r.measured_on].key: _value(r) for r in summary.evaluations if r.which == "pruned"}
    if (found := summary.end_loss) is not None:
        values[losses[found.loss, found.samples_sha256].key] = math.inf if found.value is None else found.value
    for column, figure in _FIXED:
        value = figure(summary)
        if value is not None:
            values[column.key] = value
    return Row(summary.label, name, summary.base, summary.method, summary.goal, is_original, summary.steps_left, values)


def _value(result: EvaluationResult) -> float:
    return math.inf if result.value is None else result.value


def _measured_columns(results: Sequence[EvaluationResult]) -> dict[MeasuredOn, Column]:
    """One column per evaluation set. Its key holds the amount of data if the name alone is not unique."""
    found = list(dict.fromkeys(result.measured_on for result in results))
    names = [what[:3] for what in found]
    columns = {}
    for metric, source, protocol, amount, is_partial in found:
        is_alone = names.count((metric, source, protocol)) == 1
        unit, how = metric_of(metric).details.unit, f"@{protocol}" if protocol else ""
        key, title = f"{metric}/{source}{how}", f"{metric_of(metric).title}\n{measured_label(source, protocol)}"
        if is_partial:
            title += f"\nfirst {amount:,}"
        elif not is_alone:
            title += f"\n{amount:,} {unit}"
        columns[metric, source, protocol, amount, is_partial] = Column(
            key if is_alone else f"{key}:{amount}", title, metric
        )
    return columns


def _loss_columns(found: Sequence[EndLossResult]) -> dict[tuple[str, str], Column]:
    """One column per end loss and set of samples. Its key holds the samples' digest if the name is not unique."""
    distinct = {(result.loss, result.samples_sha256): result for result in found}
    columns = {}
    for (loss, digest), result in distinct.items():
        is_alone = [other for other, _ in distinct].count(loss) == 1
        title = f"{result.title}\n{source_label(result.source)}, {counted(result.num_samples, 'sample')}"
        key = f"end_loss/{loss}" if is_alone else f"end_loss/{loss}:{digest[:8]}"
        columns[loss, digest] = Column(key, title if is_alone else f"{title} ({digest[:8]})", "loss")
    return columns


def as_json(comparison: Comparison) -> str:
    """The table as JSON: each value with its difference from the first row. Null: unknown or infinite."""

    def figure(row: Row, column: Column) -> dict[str, float | None] | None:
        if column.key not in row.values:
            return None
        value = row.values[column.key]
        return {"value": value if math.isfinite(value) else None, "delta": comparison.delta(row, column)}

    record = {
        "columns": [{"key": c.key, "title": c.title.replace("\n", " "), "unit": c.unit} for c in comparison.columns],
        "rows": [
            {
                "label": row.label,
                "model": row.base,
                "method": row.method,
                "goal": row.goal,
                "is_original": row.is_original,
                "is_finished": not row.steps_left,
                "figures": {column.key: figure(row, column) for column in comparison.columns},
            }
            for row in comparison.rows
        ],
    }
    return json.dumps(record, indent=2)


def as_csv(comparison: Comparison) -> str:
    """The table as CSV, with full precision and separate columns for differences."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [key for column in comparison.columns for key in (column.key, f"{column.key}_delta")]
    writer.writerow(["label", "model", "method", "goal", "is_original", "is_finished", *keys])
    for row in comparison.rows:
        cells: list[Any] = [row.name, row.model_name, row.method, row.goal, row.is_original, not row.steps_left]
        for column in comparison.columns:
            cells += [row.values.get(column.key), comparison.delta(row, column)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The table as Markdown."""
    titles = ["", "method", *(column.title.replace("\n", " ") for column in comparison.columns)]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(comparison.columns)]
    for row in comparison.rows:
        cells = [row.name, row.what, *(comparison.cell(row, column) for column in comparison.columns)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
