"""The quality benchmark's table as a picture. Needs matplotlib: pip install -e '.[bench]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.cells import Row
from benchmarks.quality.plan import DENSE, MAGNITUDE, ORDER
from benchmarks.quality.sections import Line, Section, frontier, has_efforts, sections_of
from benchmarks.reporting import save_figure


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Write a PNG: for each section perplexity by sparsity, by pattern and, if there are several efforts, by time.

    Returns whether it did: not where there is nothing to draw. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    sections = [section for section in sections_of(rows) if section.lines and section.texts]
    if not sections:
        return False
    columns = 3 if any(has_efforts(s.at(p)) for s in sections for p in s.points) else 2
    figure, axes = pyplot.subplots(
        len(sections), columns, figsize=(5.5 * columns, 4.2 * len(sections)), squeeze=False, layout="constrained"
    )
    named = [*ORDER, *sorted({r["method"] for r in rows} - set(ORDER))]
    colors = {method: f"C{i % 10}" for i, method in enumerate(named)}
    for section, row in zip(sections, axes, strict=True):
        for axis in row:
            axis.set_yscale("log")  # first: limits that are set on a linear axis do not carry over
        row[0].set_title(section.title, fontsize=9, loc="left")
        _by_sparsity(row[0], section, colors)
        _by_pattern(row[1], section, colors)
        if columns == 3:
            _by_time(row[2], section, colors)
        for axis in row:
            if axis.has_data():
                axis.yaxis.set_major_formatter(ticker.LogFormatter())
                axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
                axis.set_ylabel(f"perplexity, {section.texts[0]}")
                axis.grid(visible=True, which="both", alpha=0.25)
            else:
                axis.set_axis_off()
    handles = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=[DENSE, *named].index)
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
    return True


def _by_sparsity(axis, section: Section, colors: dict[str, str]) -> None:
    """One line a method, with the range over draws."""
    text = section.texts[0]
    shown = [line for line in section.lines if line.point.endswith("%") and line.mean(text) is not None]
    for method, color in colors.items():
        lines = [line for line in shown if line.method == method]
        if not lines:
            continue
        shares = [int(line.point[:-1]) for line in lines]
        axis.plot(shares, [line.mean(text) for line in lines], marker="o", markersize=4, color=color, label=method)
        ranges = [line.perplexities(text) for line in lines]
        axis.vlines(shares, [min(r) for r in ranges], [max(r) for r in ranges], color=color)
    if shown:
        axis.set_xlabel("zeros, %")
        _frame(axis, section, shown)


def _by_pattern(axis, section: Section, colors: dict[str, str]) -> None:
    """Bars, by method within each pattern."""
    text = section.texts[0]
    shown = [line for line in section.lines if ":" in line.point and line.mean(text) is not None]
    patterns = list(dict.fromkeys(line.point for line in shown))
    for place, pattern in enumerate(patterns):
        lines = [line for line in shown if line.point == pattern]
        width = 0.8 / len(lines)
        for i, line in enumerate(lines):
            left = place - 0.4 + (i + 0.5) * width
            axis.bar(left, line.mean(text), width, color=colors[line.method], label=line.method)
    if patterns:
        axis.set_xticks(range(len(patterns)), patterns)
        _frame(axis, section, shown)


def _by_time(axis, section: Section, colors: dict[str, str]) -> None:
    """Every method at the first point that several efforts were measured at; the best for their time joined."""
    text = section.texts[0]
    point = next((p for p in ("70%", *section.points) if has_efforts(section.at(p))), None)
    if point is None:
        return
    found = frontier(section.at(point), text)
    if not found:
        return
    best = [(line.cpu_seconds, line.mean(text)) for line, is_best in found if is_best]
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=1)
    for line, _ in found:
        axis.scatter(line.cpu_seconds, line.mean(text), color=colors[line.method], label=line.method, zorder=2)
    axis.set_xscale("log")
    axis.set_xlabel(f"processor seconds, at {point}")


def _frame(axis, section: Section, shown: Sequence[Line]) -> None:
    """A line for the dense model, and limits by which magnitude, far above all others, leaves the picture."""
    text = section.texts[0]
    dense = (section.dense or {}).get(f"perplexity_{text}")
    values = [line.mean(text) for line in shown if line.method != MAGNITUDE] or [line.mean(text) for line in shown]
    if dense:
        axis.axhline(float(dense), color="0.4", linestyle="--", linewidth=1, label=DENSE)
        values.append(float(dense))
    axis.set_ylim(min(values) / 1.2, 2 * max(values))
