"""Details of a measurement on annotated segmentation masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stages.metrics.details import Count, Details, Share
from stages.metrics.points import Points


@dataclass(frozen=True)
class MaskDetails(Details):
    """The annotated masks that were measured, and their mean IoU by the size of the object."""

    iou_low: Share  # the 95% interval of the mean
    iou_high: Share
    iou_small: Share | None  # None: no object of this size
    iou_medium: Share | None
    iou_large: Share | None
    num_small: Count
    num_medium: Count
    num_large: Count
    num_images: Count
    num_masks: Count
    points: Points
    skipped: Mapping[str, Count]  # images and masks that could not be used, by reason

    unit: ClassVar[str] = "masks"

    @property
    def amount(self) -> int:
        return self.num_masks

    @property
    def protocol(self) -> str:
        return self.points

    def described(self, *, is_partial: bool) -> str:
        return f"{self.num_masks} masks, {self.points} points" + (", partial" if is_partial else "")
