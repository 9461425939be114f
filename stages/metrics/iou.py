"""Single-point IoU: how well the segmentation mask that one point asks for covers the annotated one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.metrics.base import EvaluationProtocol, Measurement, Metric, MetricContext

if TYPE_CHECKING:
    from stages.data.base import DataSource
    from stages.data.image_source import ImageSource
    from stages.models.base import BlockModel


class SinglePointIoU(Metric):
    """Mean IoU over all annotated masks: one point each, the best of three masks (LAMP section 4)."""

    name = "iou"
    title = "IoU"
    help = "Mean intersection over union of the masks that one point in each annotated mask asks for."
    task = "vision"
    digits = 4
    higher_is_better = True

    def require_measurable(self, model: BlockModel, source: DataSource, protocol: EvaluationProtocol) -> None:
        from stages.errors import UsageError

        if not _images(source, model).has_masks:
            raise UsageError(f"{source.name} has no masks to measure by: evaluate on coco:DIR or sa1b:DIR")

    def measure(self, context: MetricContext) -> Measurement:
        from stages.metrics.single_point_iou import evaluate_masks
        from stages.models.sam.encoder import SamEncoder

        model, protocol = context.model, context.protocol
        assert isinstance(model, SamEncoder)
        images = _images(context.source, model)
        points, limit = protocol.points or "auto", protocol.max_images
        found = evaluate_masks(model, images, points, limit, context.scratch, context.device, context.callbacks)
        details = {name: value for name, value in found.items() if name not in ("metric", "iou", "is_partial")}
        return Measurement(self.name, found["iou"], context.source.name, found["is_partial"], details)

    @classmethod
    def how_measured(cls, details: Mapping[str, Any], *, is_partial: bool) -> str:
        return f"{details['num_masks']} masks, {details['points']} points" + (", partial" if is_partial else "")


def _images(source: DataSource, model: BlockModel) -> ImageSource:
    from stages.data.base import require_task
    from stages.data.image_source import ImageSource

    require_task(source, model)
    assert isinstance(source, ImageSource)
    return source
