"""Style of the report's figures: colours that colour-blind readers can distinguish, few lines."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#c23b22", "#7b5ea7", "#8a8f98"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#b08a00", "#56b4e9", "#cc79a7", GREY)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
INK, FAINT = "#24292f", "#d8dce2"
WIDTH = 10.0  # inches
_DPI = 160

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # names of models and files are what they are
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
}


def require_matplotlib() -> None:
    """Raise ConfigError with the install command if matplotlib is missing."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install '.[report]' in the clone of lampctl") from error


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def png(draw: Callable[[Figure], None], height: float) -> bytes:
    """Draw a figure of full width and return it as PNG. height: in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _styled():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        # Without version and date, equal numbers give equal bytes.
        figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
        return out.getvalue()


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic with plain numbers, also if all values are within one power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    known = [value for value in values if value > 0 and math.isfinite(value)]
    if not known:
        return
    axes.set_yscale("log")
    span = max(math.log10(max(known) / min(known)), 0.05)
    low, high = min(known) / 10 ** (0.1 * span), max(known) * 10 ** (0.1 * span)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """At most nine round numbers from `low` to `high`."""
    from matplotlib.ticker import MaxNLocator

    if high / low < 2.5:
        return [
            tick
            for tick in MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            if low <= tick <= high
        ]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for heads in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for k in decades for head in heads if low <= (tick := head * 10.0**k) <= high]
        if len(ticks) <= 9:
            break
    return ticks[:: math.ceil(len(ticks) / 9)] if ticks else []


def block_axis(axes: Axes, num_blocks: int) -> None:
    """Make the x axis count blocks, with a tick for each if there is room."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    axes.set_xlim(-0.6, num_blocks - 0.4)
    axes.grid(visible=False, axis="x")
    if num_blocks <= 24:
        axes.set_xticks(range(num_blocks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 4, 5, 10]))
