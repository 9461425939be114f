"""The quality benchmark's table as a picture. Needs matplotlib: pip install -e '.[bench]'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Row
from benchmarks.quality.methods import DENSE, MAGNITUDE, ORDER, POINTS
from benchmarks.quality.sections import PERPLEXITY, Line, Section, curve, frontier, number, sections_of, studies_of
from benchmarks.reporting import save_figure

_NUM_COLUMNS = 3
_MARKERS = "osD^vP"


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Write a PNG of the first study: perplexity by sparsity, by processor time at each point, by samples.

    Returns whether it did: not where there is nothing to draw. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(rows)
    if not panels:
        return False
    num_columns = min(_NUM_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size = (4.6 * num_columns, 3.4 * num_rows + 0.8)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles = {}
    for axis, fill in zip(axes.flat, panels, strict=False):
        axis.set_yscale("log")  # first: limits that are set on a linear axis do not carry over
        fill(axis)
        _plain_numbers(axis.yaxis)
        axis.grid(visible=True, which="both", alpha=0.25)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=ORDER.index)
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
    return True


def _panels(rows: Sequence[Row]) -> list[Callable]:
    """What fills one axis each; only those that have something to show."""
    core, samples = _core_and_samples(rows)
    panels: list[Callable] = []
    for column in core.columns:
        lines = [line for line in core.beside if line.point.endswith("%") and line.mean(column) is not None]
        if len({line.point for line in lines}) > 1:
            panels.append(partial(_by_sparsity, core=core, lines=lines, column=column))
    for point in POINTS:
        for column in core.columns[:1]:
            found = frontier([line for line in core.beside if line.point == point], column)
            if len(found) > 1:
                panels.append(partial(_by_time, core=core, point=point, found=found, column=column))
    for column in samples.columns:
        points = curve(samples, column)
        if len(points) > 1:
            panels.append(partial(_by_samples, points=points, column=column))
    return panels


def _core_and_samples(rows: Sequence[Row]) -> tuple[Section, Section]:
    by_name = {section.name: section for section in sections_of(rows, studies_of(rows)[0])}
    return by_name["core"], by_name["samples"]


def _by_sparsity(axis, core: Section, lines: Sequence[Line], column: str) -> None:
    """One curve a method, with the range over draws."""
    for method in ORDER:
        mine = sorted((line for line in lines if line.method == method), key=_percent)
        if not mine:
            continue
        shares = [_percent(line) for line in mine]
        axis.plot(shares, [line.mean(column) for line in mine], markersize=4, label=method, **_style(method))
        ranges = [line.values(column) for line in mine]
        axis.vlines(shares, [min(r) for r in ranges], [max(r) for r in ranges], color=_style(method)["color"])
    axis.set_xlabel("zeros, %")
    axis.set_title("by sparsity", fontsize=9, loc="left")
    _frame(axis, core, lines, column)


def _by_time(axis, core: Section, point: str, found: Sequence[tuple[Line, bool]], column: str) -> None:
    """Every method at a point; those that no faster method beats are joined."""
    best = [(line.mean("cpu_seconds"), line.mean(column)) for line, is_best in found if is_best]
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=1)
    for line, _ in found:
        style = {**_style(line.method), "linestyle": ""}
        axis.plot(line.mean("cpu_seconds"), line.mean(column), label=line.method, zorder=2, **style)
    axis.set_xscale("log")
    _plain_numbers(axis.xaxis)
    axis.set_xlabel("processor seconds")
    axis.set_title(f"at {point}", fontsize=9, loc="left")
    _frame(axis, core, [line for line, _ in found], column)


def _by_samples(axis, points: Sequence[tuple[int, float]], column: str) -> None:
    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color="0.2")
    axis.set_xscale("log", base=2)
    axis.set_xticks([count for count, _ in points], [str(count) for count, _ in points])
    axis.set_xlabel("samples that LAMP is distilled on")
    axis.set_ylabel(f"perplexity, {column.removeprefix(PERPLEXITY)}")
    axis.set_title("at 2:4", fontsize=9, loc="left")


def _frame(axis, core: Section, lines: Sequence[Line], column: str) -> None:
    """A line for the dense model, and limits by which magnitude, far above all others, leaves the picture."""
    values = [line.mean(column) for line in lines if line.method != MAGNITUDE] or [line.mean(column) for line in lines]
    dense = number(core.dense or {}, column)
    if dense is not None:
        axis.axhline(dense, color="0.4", linestyle="--", linewidth=1, label=DENSE)
        values.append(dense)
    axis.set_ylim(min(values) / 1.2, 1.5 * max(values))
    axis.set_ylabel(f"perplexity, {column.removeprefix(PERPLEXITY)}")


def _plain_numbers(axis) -> None:
    """Tick labels of a logarithmic axis: 600, not 6 x 10^2."""
    from matplotlib import ticker

    axis.set_major_formatter(ticker.LogFormatter())
    axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_tick_params(which="both", labelsize=7)


def _percent(line: Line) -> int:
    return int(line.point[:-1])


def _style(method: str) -> dict[str, Any]:
    """Color and marker, the same in every panel."""
    import matplotlib

    place = ORDER.index(method)
    # The palette has ten colors in two shades, the dark one first. LAMP stands behind its baselines, and is dark.
    is_later, color = divmod(place, 10)
    shade = 0 if is_later else 1
    return {"color": matplotlib.colormaps["tab20"](2 * color + shade), "marker": _MARKERS[place % len(_MARKERS)]}
