"""Pictures of the speed benchmark. Needs matplotlib: pip install -e '.[bench]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import save_figure

_LANES = ("read", "compute", "write")
_SHOWN_S = 0.6  # of the timeline: enough for some samples


def draw_overlap(timeline: Sequence[tuple[str, float, float]], path: Path) -> None:
    """A pass over samples as it went: what the reader, the computing thread and the writer did when."""
    from matplotlib import pyplot

    writes = [start for kind, start, _ in timeline if kind == "write"]
    if not writes:
        raise ValueError("the timeline holds no pass that writes")
    begin = writes[len(writes) // 4] - 0.05
    figure, axis = pyplot.subplots(figsize=(9, 2.6), layout="constrained")
    for place, lane in enumerate(_LANES):
        spans = [(start - begin, end - start) for kind, start, end in timeline if kind == lane]
        spans = [(start, length) for start, length in spans if 0 <= start < _SHOWN_S]
        axis.broken_barh([(1000 * s, 1000 * n) for s, n in spans], (place - 0.35, 0.7), color=f"C{place}")
    axis.set_yticks(range(len(_LANES)), ["reader thread", "forward pass", "writer thread"])
    axis.invert_yaxis()
    last = max((end for _, start, end in timeline if 0 <= start - begin < _SHOWN_S), default=begin + _SHOWN_S)
    axis.set_xlim(0, 1000 * min(_SHOWN_S, last - begin + 0.02))
    axis.set_xlabel("milliseconds of a pass of the biased stream through a block")
    axis.grid(visible=True, axis="x", alpha=0.25)
    save_figure(figure, path)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory against depth and samples, and how far each ratio is from its target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, what in zip(axes, ("blocks", "samples"), strict=False):
        points = [(r["case"].split()[0], float(r["value"])) for r in rows if r["case"].endswith(f" {what}")]
        points = [(int(x), y) for x, y in points if x.isdigit()]
        if not points:
            axis.set_axis_off()
            continue
        axis.plot(*zip(*points, strict=True), "o-")
        axis.set_ylim(0, 1.3 * max(y for _, y in points))
        axis.set_xlabel(what)
        axis.set_ylabel("peak memory of the process, MB")
        axis.grid(visible=True, alpha=0.25)
    stores = [(r["case"], float(r["value"])) for r in rows if r["figure"] == "P8" and r["unit"] == "ratio"]
    arithmetic = [(r["case"], float(r["value"])) for r in rows if r["figure"] == "P1"]
    bars = [*arithmetic, *stores]
    if bars:
        axes[2].barh([name for name, _ in bars], [value for _, value in bars], color="C2")
        axes[2].axvline(1, color="black", linewidth=0.8)
        axes[2].invert_yaxis()
        axes[2].tick_params(axis="y", labelsize=7)
        axes[2].set_xlabel("of what the machine can do")
    else:
        axes[2].set_axis_off()
    save_figure(figure, path)
