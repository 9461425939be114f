"""What the figures that a model is judged by are called, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure of merit."""

    title: str
    digits: int
    higher_is_better: bool


METRICS = {
    "perplexity": Metric("perplexity", 2, False),
    "iou": Metric("IoU", 4, True),
}


def figure_text(metric: str, value: float | None) -> str:
    """A value as tables have it; "-" where there is none, "infinite" where it overflowed."""
    if value is None:
        return "-"
    return f"{value:.{METRICS[metric].digits}f}" if math.isfinite(value) else "infinite"


def how_measured(metric: str, figures: Mapping[str, Any], *, is_partial: bool) -> str:
    """On what, in a few words. figures: the record that an evaluation left."""
    if metric == "iou":
        return f"{figures['num_masks']} masks, {figures['points']} points" + (", partial" if is_partial else "")
    partial = f", partial: first {figures['num_tokens']} tokens" if is_partial else ""
    return f"{figures['seqlen']} tokens a window{partial}"
