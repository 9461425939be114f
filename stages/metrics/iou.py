"""Single-point IoU: how well the segmentation mask that one point asks for covers the annotated one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.metrics.base import EvaluationProtocol, Measurement, Metric, MetricContext
from stages.metrics.mask_details import MaskDetails

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
    least, most = 0.0, 1.0
    details = MaskDetails

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
        return Measurement(self.name, found.iou, context.source.name, found.is_partial, found.details)


def _images(source: DataSource, model: BlockModel) -> ImageSource:
    from stages.data.base import require_contents
    from stages.data.image_source import ImageSource

    require_contents(source, ImageSource.contents, model)
    assert isinstance(source, ImageSource)
    return source
