"""The report of a sweep: how each figure responds to the settings that were varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lampctl.output.labels import source_label
from lampctl.output.trials import is_partial, partial_note, trial_value
from lampctl.output.units import duration
from lampctl.report.data import Cell, Dataset
from lampctl.report.folder import files_of, require_ours, write_folder
from lampctl.report.page import Paragraph, Part, Picture, Section, Table, page
from lampctl.report.style import INK, MARKERS, SERIES, log_axis, png, require_matplotlib
from pipeline.rundir.redact import scrub
from stages.metrics.registry import figure_text, metric_of
from stages.pruners.registry import method_title
from stages.version import VERSION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.sweeps.sweep import Sweep
    from pipeline.sweeps.trial import TrialState
    from stages.metrics.base import Metric

_OWN = ("trial", "state", "metric", "data", "which", "value", "is_partial")


def write_response(sweep: Sweep, states: Sequence[TrialState], out: Path) -> list[Path]:
    """Write the report of a sweep to the folder `out`; the files that were written, the page first.

    Raises ConfigError where `out` holds something else, or matplotlib is missing.
    """
    require_matplotlib()
    require_ours(out, [sweep.place])
    table = measured(sweep, states)
    sections = [_trials(sweep, states)]
    drawn: list[Picture] = []
    for metric, data in dict.fromkeys(zip(table.column("metric"), table.column("data"), strict=True)):
        part = table.where("metric", metric).where("data", data)
        if not any(math.isfinite(value) for value in part.where("which", "pruned").numbers("value")):
            continue
        title = f"{metric_of(str(metric)).title} on {data}"
        caption = "Every point is a run. Dashed: the model before pruning." if _dense(part) is not None else ""
        name = "".join(c if c.isalnum() else "-" for c in f"{metric}-{data}").strip("-")
        image = draw(part, sweep.spec.fields, is_search=bool(sweep.spec.search))
        drawn.append(Picture(name, image, title, caption, part.csv()))
        sections.append(Section(name, title, (drawn[-1],)))
    files = {"trials.csv": table.csv().encode(), **files_of(drawn)}
    done = sum(state.state == "done" for state in states)
    model = Path(sweep.spec.gathered.values.model).name
    title = f"{model}: {', '.join(sweep.spec.fields)}"
    subtitle = scrub(f"{sweep.storage.label}, {done} of {sweep.spec.num_trials or len(states)} trials are done")
    footer = f"Made by lampctl {VERSION} from the commits of the trials' runs."
    return write_folder(out, files, lambda names: page(title, subtitle, sections, footer, names))


def measured(sweep: Sweep, states: Sequence[TrialState]) -> Dataset:
    """Every figure of every trial, with the settings that are the trial's own."""
    fields = sweep.spec.fields
    rows: list[tuple[Cell, ...]] = []
    for state in states:
        point = tuple(_cell(state.trial.point.get(field)) for field in fields)
        for result in state.run.evaluations if state.run is not None else ():
            about = (result.metric, source_label(result.source), result.which, result.value, int(result.is_partial))
            rows.append((state.trial.name, state.state, *about, *point))
    return Dataset((*_OWN, *fields), tuple(rows))


def draw(data: Dataset, fields: Sequence[str], *, is_search: bool) -> bytes:
    """The response: against the number that takes most values, a line for each combination of the other settings.

    Of a search a panel for each setting, every trial a point.
    """
    pruned = data.where("which", "pruned")
    numeric = [field for field in fields if _is_numeric(pruned, field)]
    if is_search:
        return png(lambda figure: _scatter(figure, data, numeric), 4.2 * math.ceil(len(numeric) / 2))
    if not numeric:
        return png(lambda figure: _bars(figure, data, fields), 4.6)
    across = max(numeric, key=lambda field: len(pruned.distinct(field)))
    others = [field for field in fields if field != across]
    return png(lambda figure: _lines(figure, data, across, others), 4.8)


def _lines(figure: Figure, data: Dataset, across: str, others: Sequence[str]) -> None:
    axes = figure.subplots()
    pruned = data.where("which", "pruned")
    columns = [pruned.column(field) for field in others]
    combinations = list(dict.fromkeys(zip(*columns, strict=True))) if others else [()]
    for number, combination in enumerate(combinations):
        part = pruned
        for field, value in zip(others, combination, strict=True):
            part = part.where(field, value)
        pairs = zip(part.numbers(across), part.numbers("value"), strict=True)
        points = sorted(pair for pair in pairs if math.isfinite(pair[1]))
        if not points:
            continue
        x, y = zip(*points, strict=True)
        name = ", ".join(_named(field, value) for field, value in zip(others, combination, strict=True))
        style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(x, y, **style, markersize=7, markeredgecolor="white", label=name or None)
    _finish(axes, data, across)
    ticks = sorted(set(pruned.numbers(across)))
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if others:
        axes.legend(loc="best")


def _scatter(figure: Figure, data: Dataset, fields: Sequence[str]) -> None:
    pruned = data.where("which", "pruned")
    sign = 1 if _metric(data).higher_is_better else -1
    values = pruned.numbers("value")
    finite = [value for value in values if math.isfinite(value)]
    best = max(finite, key=lambda value: sign * value)
    grid = figure.subplots(math.ceil(len(fields) / 2), min(len(fields), 2), squeeze=False).ravel().tolist()
    for axes, field in zip(grid, fields, strict=False):
        x = pruned.numbers(field)
        axes.scatter(x, values, s=46, color=SERIES[0], edgecolor="white", linewidth=0.8)
        at = values.index(best)
        axes.scatter([x[at]], [best], s=150, marker="*", color=SERIES[1], zorder=4, label=f"best: {x[at]:.4g}")
        if min(x) > 0 and max(x) / min(x) > 20:
            axes.set_xscale("log")
        _finish(axes, data, field)
        axes.legend(loc="best")
    for axes in grid[len(fields) :]:
        axes.remove()


def _bars(figure: Figure, data: Dataset, fields: Sequence[str]) -> None:
    axes = figure.subplots()
    pruned = data.where("which", "pruned")
    names = [
        "\n".join(_named(field, value) for field, value in zip(fields, point, strict=True))
        for point in zip(*(pruned.column(field) for field in fields), strict=True)
    ]
    axes.bar(range(len(names)), pruned.numbers("value"), color=SERIES[0], width=0.6)
    axes.set_xticks(range(len(names)), names)
    _finish(axes, data, None)


def _finish(axes: Axes, data: Dataset, across: str | None) -> None:
    kind, dense = _metric(data), _dense(data)
    values = [value for value in data.where("which", "pruned").numbers("value") if math.isfinite(value)]
    span = max(values) - min(values)
    if dense is not None and min(values) - span <= dense <= max(values) + span:
        axes.axhline(dense, color=INK, linestyle=(0, (4, 3)), linewidth=1.4)
        axes.annotate(
            f"dense {kind.text(dense)}", (0.995, dense), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", fontsize=10, ha="right", va="bottom",
        )  # fmt: skip
        values.append(dense)
    elif dense is not None:  # so far away that it would leave no room for the response
        axes.annotate(
            f"dense {kind.text(dense)} (not to scale)", (0.995, 0.98), xycoords="axes fraction", fontsize=10,
            ha="right", va="top",
        )  # fmt: skip
    if not kind.higher_is_better and max(values) > 2 * min(values):
        log_axis(axes, values)
    axes.set(ylabel=kind.title, xlabel=(across or "").replace("_", " "))
    axes.margins(x=0.06, y=0.12)


def _trials(sweep: Sweep, states: Sequence[TrialState]) -> Section:
    fields = sweep.spec.fields
    measured_on = list(
        dict.fromkeys((r.metric, r.source) for state in states if state.run for r in state.run.evaluations)
    )
    titles = [f"{metric_of(metric).title}, {source_label(source)}" for metric, source in measured_on]
    rows = []
    for state in states:
        values = [trial_value(state, what) for what in measured_on]
        shown = [
            figure_text(what[0], value) + ("*" if is_partial(state, what) else "")
            for what, value in zip(measured_on, values, strict=True)
        ]
        run = state.run
        sparsity = "-" if run is None or run.sparsity is None else f"{100 * run.sparsity:.2f}%"
        took = "-" if run is None or not run.num_done else duration(run.pruning_s)
        point = (_text(state.trial.point.get(field)) for field in fields)
        rows.append((*point, state.state, *shown, sparsity, took))
    columns = (*fields, "state", *titles, "achieved", "pruning time")
    parts: list[Part] = [Table(columns, tuple(rows), num_labels=len(fields) + 1)]
    note = partial_note(states)
    if note is not None:
        parts.append(Paragraph(note))
    failed = [f"{state.trial.name} failed: {scrub(state.error)}" for state in states if state.error is not None]
    return Section("trials", "Trials", (*parts, *(Paragraph(line) for line in failed)))


def _metric(data: Dataset) -> type[Metric]:
    return metric_of(str(data.column("metric")[0]))


def _dense(data: Dataset) -> float | None:
    found = [value for value in data.where("which", "dense").numbers("value") if math.isfinite(value)]
    return found[0] if found else None


def _is_numeric(data: Dataset, field: str) -> bool:
    cells = [cell for cell in data.column(field) if cell is not None]
    return bool(cells) and all(isinstance(cell, int | float) for cell in cells) and len(set(cells)) > 1


def _cell(value: Any) -> Cell:
    """A setting's value as a number where it is one: on the command line all are text."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value if isinstance(value, int | float) else None


def _named(field: str, value: Cell) -> str:
    if field == "method":
        return method_title(str(value))
    return f"{field.replace('_', ' ')} {_text(value)}"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
