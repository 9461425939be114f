"""The masks of vision models side by side: what was annotated, what the original and what the pruned models answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lampctl.report.style import BLUE, WIDTH, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lampctl.report.mask_samples import MaskSample


def mask_gallery(samples: Sequence[Sequence[MaskSample]], names: Sequence[str]) -> bytes:
    """A row for each picture: annotated, dense, and each run's answer with its IoU. names: of the runs."""
    first = samples[0]
    titles = ["annotated", "dense", *names]

    def draw(figure: Figure) -> None:
        heights = [height / width for height, width in (sample.asked.mask.shape for sample in first)]
        grid = figure.subplots(len(first), len(titles), squeeze=False, height_ratios=heights)
        for row, sample in enumerate(first):
            answers = [sample.dense, *(of_run[row].pruned for of_run in samples)]
            masks = [sample.asked.mask, *(answer.mask for answer in answers)]
            notes = ["", *(f"IoU {answer.iou:.2f}" for answer in answers)]
            for axes, mask, title, note in zip(grid[row], masks, titles, notes, strict=True):
                _panel(axes, sample, mask, title if row == 0 else "", note)

    shapes = [sample.asked.mask.shape for sample in first]
    return png(draw, 0.4 + sum(WIDTH / len(titles) * height / width + 0.35 for height, width in shapes))


def _panel(axes: Axes, sample: MaskSample, mask: np.ndarray, title: str, note: str) -> None:
    from matplotlib.colors import to_rgb

    pixels = sample.asked.pixels.astype(float) / 255
    tint: Any = np.array(to_rgb(BLUE))
    pixels[mask] = 0.4 * pixels[mask] + 0.6 * tint
    axes.imshow(pixels, interpolation="nearest")
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors="white", linewidths=1.2)
    axes.plot(*sample.asked.point, marker="o", color="#e3342f", markeredgecolor="white", markersize=7)
    axes.set(xticks=[], yticks=[], title=title, xlabel=note)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
