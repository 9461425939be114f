"""What the figures that a model is judged by are called, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass


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
    """A value as tables have it; "-" where there is none."""
    return "-" if value is None else f"{value:.{METRICS[metric].digits}f}"
