"""Image encoders: images in, features out, compared with those of the original model."""

from __future__ import annotations

from stages.data.image_decoding import processed
from stages.models.base import BlockModel
from stages.models.image_encoder import ImageEncoder
from stages.tasks.image_task import ImageTask, PixelReader


class VisionFeatures(ImageTask):
    """A `stages.tasks.base.Task`."""

    name = "vision-features"
    title = "image features"
    help = "ViT, DINOv2, CLIP's vision tower: images, cosine of the features to the original model's."
    loader = "AutoModel"
    loading = (
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'model = AutoModel.from_pretrained("PATH/TO/THIS/FOLDER", dtype="float32")',
        'processor = AutoImageProcessor.from_pretrained("PATH/TO/THIS/FOLDER")',
    )
    metric = "feature_cosine"
    missing_evaluation: str | None = "nothing is measured: name pictures by --evaluate images:DIR"

    def pixel_reader(self, model: BlockModel) -> PixelReader:
        assert isinstance(model, ImageEncoder)
        return lambda record: processed(record, model.processor)
