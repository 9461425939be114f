"""Figures of the report, each drawn from one table of `lampctl.report.data`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lampctl.output.labels import step_label
from lampctl.output.units import duration
from lampctl.report.data import WHOLE_BLOCK, Cell, Dataset
from lampctl.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    SERIES,
    block_axis,
    log_axis,
    png,
)
from pipeline.steps.registry import STEP_KINDS
from stages.metrics.registry import metric_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stages.metrics.base import Metric

# Colours of the kinds of steps in the order of their registry, and of the trainings of a block.
_KINDS = (GREY, "#56b4e9", "#b08a00", ORANGE, GREEN, BLUE, "#cc79a7", PURPLE, RED)
_TRAININGS = (BLUE, GREEN, PURPLE, RED)


def measured_by_sparsity(data: Dataset) -> bytes:
    """One panel per metric, data set and model; one line per method; the original as a dashed line."""
    panels = list(dict.fromkeys(row[:4] for row in data.rows))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), squeeze=False).ravel().tolist()
        series = [name for name in data.distinct("series") if name != "dense"]
        several_models = len({panel[0] for panel in panels}) > 1
        for axes, (model, metric, source, amount) in zip(grid, panels, strict=False):
            part = data.where("model", model).where("metric", metric).where("data", source).where("amount", amount)
            title = f"{_last(model)}, {source}" if several_models else str(source)
            _measured_panel(axes, part, series, str(metric), title)
        for axes in grid[len(panels) :]:
            axes.remove()

    return png(draw, 4.6 * math.ceil(len(panels) / 2))


def _measured_panel(axes: Axes, data: Dataset, series: list[Cell], metric: str, title: str) -> None:
    from matplotlib.ticker import PercentFormatter

    kind = metric_of(metric)
    dense = [value for value in data.where("series", "dense").numbers("value") if math.isfinite(value)]
    if dense:
        axes.axhline(dense[0], color=INK, linestyle=(0, (4, 3)), linewidth=1.4)
        axes.annotate(
            f"dense {kind.text(dense[0])}", (0.995, dense[0]), xycoords=("axes fraction", "data"),
            xytext=(0, -5), textcoords="offset points", fontsize=10, ha="right", va="top",
        )  # fmt: skip
    ends: list[tuple[float, float]] = []
    for number, name in enumerate(series):
        part = data.where("series", name)
        pairs = zip(part.numbers("sparsity"), part.numbers("value"), strict=True)
        points = sorted(pair for pair in pairs if math.isfinite(pair[1]))
        if not points:
            continue
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(x, y, **style, markersize=7, markeredgecolor="white", label=name)
        ends.append((y[-1], x[-1]))
    if not kind.higher_is_better:  # a perplexity may be anything; an IoU lies between 0 and 1
        log_axis(axes, data.numbers("value"))
        _label_ends(axes, ends, kind)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title=title, xlabel="sparsity achieved", ylabel=kind.title)
    if ends:
        axes.legend(loc="lower left" if kind.higher_is_better else "upper left")


def _label_ends(axes: Axes, ends: list[tuple[float, float]], kind: type[Metric]) -> None:
    """Write the last value of each line beside it, without overlaps."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap, free_from = 0.05 * (high - low), -math.inf
    for value, x in sorted(end for end in ends if math.isfinite(end[0])):
        place = max(math.log(value), free_from)
        free_from = place + gap
        axes.annotate(
            kind.text(value), (x, math.exp(place)), xytext=(8, 0), textcoords="offset points", va="center", fontsize=10
        )


def error_by_block(data: Dataset, relative: bool) -> bytes:
    """One dumbbell per training of a block: from the loss before to the loss after."""
    held_out = _has_values(data, "after_held_out")
    side = "_held_out" if held_out else ""
    trainings = _trainings(data)
    area = 54 if _num_blocks(data) <= 16 else 24
    shifts = _shifts(trainings)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends: dict[float, list[tuple[float, float, float]]] = {}  # by block: x, before, after
        for number, training in enumerate(trainings):
            part = data.where("training", training)
            blocks = part.numbers("block")
            x = [block + shifts[training] for block in blocks]
            before, after = part.numbers(f"before{side}"), part.numbers(f"after{side}")
            for block, *end in zip(blocks, x, before, after, strict=True):
                ends.setdefault(block, []).append((end[0], end[1], end[2]))
            color = _TRAININGS[number % len(_TRAININGS)]
            axes.vlines(x, before, after, color=color, linewidth=3.5, alpha=0.35)
            axes.scatter(x, before, s=area, facecolor="white", edgecolor=color, linewidth=1.6, zorder=3)
            axes.scatter(x, after, s=area, color=color, zorder=4, label=training)
        label: str | None = "from one training to the next"
        for found in ends.values():
            for (x_from, _, y_from), (x_to, y_to, _) in itertools.pairwise(found):
                style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.3, "linestyle": (0, (2, 1.5)), "zorder": 2}
                axes.plot((x_from, x_to), (y_from, y_to), **style, label=label)
                label = None
        log_axis(axes, [value for found in ends.values() for _, *pair in found for value in pair])
        block_axis(axes, _num_blocks(data))
        measure = "relative error of each token" if relative else "mean squared error"
        axes.set_ylabel(f"{measure},\nbiased against dense stream")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        whose = "held-out samples" if held_out else "samples trained on"
        axes.set_title(f"Error behind each block ({whose}): open before training, filled after it")

    return png(draw, 4.8)


def _shifts(trainings: Sequence[str]) -> dict[str, float]:
    """Where the dumbbell of each training stands beside the number of its block."""
    middle, width = (len(trainings) - 1) / 2, min(0.34, 0.7 / max(1, len(trainings)))
    return {training: width * (number - middle) for number, training in enumerate(trainings)}


def pruning_error_by_layer(data: Dataset) -> bytes:
    """One line per kind of layer over the depth of the model."""
    num_blocks = _num_blocks(data)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, layer in enumerate(data.distinct("layer")):
            part = data.where("layer", layer)
            style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(
                part.numbers("block"), part.numbers("relative_error"), **style,
                markersize=5 if num_blocks > 24 else 7, markeredgecolor="white", label=str(layer),
            )  # fmt: skip
        log_axis(axes, data.numbers("relative_error"))
        block_axis(axes, num_blocks)
        lost, whole = "Wx \N{MINUS SIGN} W\N{PRIME}x", "Wx"
        axes.set_ylabel(f"|{lost}|\N{SUPERSCRIPT TWO} / |{whole}|\N{SUPERSCRIPT TWO}")
        axes.set_title("What pruning cost each layer, on the biased stream, before any training")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return png(draw, 4.4)


def sparsity_by_layer(data: Dataset) -> bytes:
    """Two heat maps: sparsity of the budget, and of the exported weights."""
    from matplotlib.ticker import PercentFormatter

    layers = [*(name for name in data.distinct("layer") if name != WHOLE_BLOCK), WHOLE_BLOCK]
    blocks = [int(value) for value in data.distinct("block") if isinstance(value, int)]
    known = [v for name in ("budget", "achieved") for v in data.numbers(name) if not math.isnan(v)]
    low, high = min(known), max(known)
    middle, reach = (low + high) / 2, max((high - low) / 2, 0.01)
    height = 1.3 + 2 * (0.7 + 0.36 * len(layers))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        figure.get_layout_engine().set(h_pad=0.1)
        titles = ("Budget", "Achieved: masked weights counted in the exported model")
        image = None
        for axes, name, title in zip(panels, ("budget", "achieved"), titles, strict=True):
            values = {(row[0], row[1]): row[data.columns.index(name)] for row in data.rows}
            matrix = [[_number(values.get((block, layer))) for block in blocks] for layer in layers]
            image = axes.imshow(matrix, aspect="auto", cmap="YlGnBu", vmin=middle - reach, vmax=middle + reach)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_title(title)
            axes.grid(visible=False)
            axes.set_facecolor("#f0f1f4")  # of what is not there yet
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.axhline(len(layers) - 1.5, color="white", linewidth=4)
            if len(blocks) <= 14:
                _write_cells(axes, matrix, middle + 0.2 * reach)
        panels[1].set_xlabel("block")
        if len(blocks) <= 24:
            panels[1].set_xticks(range(len(blocks)), [str(block) for block in blocks])
        assert image is not None
        bar = figure.colorbar(image, ax=list(panels), shrink=0.85, aspect=30, pad=0.015)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))  # with the digits that tell its ticks apart
        bar.outline.set_visible(False)

    return png(draw, height)


def _write_cells(axes: Axes, matrix: list[list[float]], dark_from: float) -> None:
    for y, row in enumerate(matrix):
        for x, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value > dark_from else INK
                axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", color=color, fontsize=9.5)


def training_curves(data: Dataset) -> bytes:
    """Loss over epochs: one line per block, lighter with depth. A ring marks the epoch of the kept weights."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator
    from numpy import linspace

    trainings = _trainings(data)
    held_out = _has_values(data, "held_out")
    blocks = data.numbers("block")
    # Without its lightest end, which cannot be seen on white.
    colors = ListedColormap(colormaps["viridis"](linspace(0.0, 0.9, 256)))
    shades = ScalarMappable(Normalize(min(blocks), max(max(blocks), min(blocks) + 1)), colors)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(trainings), sharey=True, squeeze=False).ravel().tolist()
        judged = "held_out" if held_out else "trained"
        for axes, training in zip(panels, trainings, strict=True):
            part = data.where("training", training)
            for block in part.distinct("block"):
                curve = part.where("block", block)
                color = colors(shades.norm(float(block or 0)))
                epochs = curve.numbers("epoch")
                if held_out:
                    axes.plot(epochs, curve.numbers("trained"), color=color, linewidth=1.0, linestyle=":")
                axes.plot(epochs, curve.numbers(judged), color=color, linewidth=1.8)
                kept = curve.where("is_kept", 1)
                axes.scatter(
                    kept.numbers("epoch"), kept.numbers(judged), s=46, facecolor="white", edgecolor=color,
                    linewidth=1.8, zorder=4,
                )  # fmt: skip
            axes.set(title=training.capitalize(), xlabel="epoch (0: before training)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(visible=False, axis="x")
        log_axis(panels[0], [*data.numbers("trained"), *data.numbers("held_out")])
        lines = "solid: held-out samples, dotted: trained on" if held_out else "samples trained on"
        panels[0].set_ylabel(f"loss\n({lines})")
        bar = figure.colorbar(shades, ax=panels, pad=0.015, aspect=30)
        bar.set_label("block")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.outline.set_visible(False)

    return png(draw, 4.6)


def steps(data: Dataset) -> bytes:
    """Seconds and peak memory of each step, in order."""
    colors = _colors_of_kinds([str(kind) for kind in data.distinct("kind")])

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for kind in data.distinct("kind"):
            part = data.where("kind", kind)
            seconds = part.numbers("elapsed_s")
            label = f"{kind}  {duration(math.fsum(seconds))}"
            above.bar(part.numbers("number"), seconds, width=0.85, color=colors[str(kind)], label=label)
        above.set(title="Time of each step", ylabel="seconds")
        above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="in all", alignment="left")
        number = data.numbers("number")
        memory = (("peak_memory_bytes", "process", BLUE), ("peak_device_bytes", "GPU", ORANGE))
        for name, label, color in memory:
            gigabytes = [value / 1e9 for value in data.numbers(name)]
            if not all(math.isnan(value) for value in gigabytes):
                below.plot(number, gigabytes, color=color, drawstyle="steps-mid", label=label)
        below.set(title="Peak memory of each step", ylabel="GB", xlabel="step")
        below.set_ylim(0, 1.15 * below.get_ylim()[1])
        if below.lines:
            below.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for axes in (above, below):
            axes.grid(visible=False, axis="x")
            axes.set_xlim(-0.8, len(number) - 0.2)
        below.grid(color=FAINT)

    return png(draw, 5.2)


def series(data: Dataset) -> bytes:
    """One line per step."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, step in enumerate(data.distinct("step")):
            part = data.where("step", step)
            color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            axes.plot(part.numbers("x"), part.numbers("y"), color=color, marker=marker, label=step_label(str(step)))
        axes.set(xlabel=str(data.column("x_title")[0]), ylabel=str(data.column("y_title")[0]))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return png(draw, 4.4)


def _colors_of_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of step, the same in every report."""
    order = [*STEP_KINDS.names, *(kind for kind in kinds if kind not in STEP_KINDS)]
    return {kind: _KINDS[order.index(kind) % len(_KINDS)] for kind in kinds}


def _trainings(data: Dataset) -> list[str]:
    """The trainings in the order of a run: that of the block with the most of them."""
    by_block = [data.where("block", block).distinct("training") for block in data.distinct("block")]
    fullest = max(by_block, key=len, default=[])
    return [str(training) for training in dict.fromkeys((*fullest, *data.distinct("training")))]


def _num_blocks(data: Dataset) -> int:
    return 1 + max(int(value) for value in data.numbers("block"))


def _has_values(data: Dataset, column: str) -> bool:
    return any(value is not None for value in data.column(column))


def _number(value: Cell) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _last(path: Cell) -> str:
    return str(path).rstrip("/").rpartition("/")[2]
