"""Segment Anything: images in, single-point IoU out."""

from __future__ import annotations

from torch import Tensor

from stages.data.image_decoding import prepare, read_pixels
from stages.data.image_source import ImageRecord
from stages.models.base import BlockModel
from stages.models.sam.encoder import SamEncoder
from stages.tasks.image_task import ImageTask, PixelReader


class Vision(ImageTask):
    """A `stages.tasks.base.Task`."""

    name = "vision"
    title = "segmentation"
    help = "Segment Anything: images, single-point IoU."
    loader = "SamModel"
    loading = (
        "from transformers import SamModel, SamProcessor",
        "",
        'model = SamModel.from_pretrained("PATH/TO/THIS/FOLDER", dtype="float32")',
        'processor = SamProcessor.from_pretrained("PATH/TO/THIS/FOLDER")',
        "",
        "# or, of Meta's three sizes, by Meta's package:",
        "from segment_anything import sam_model_registry",
        "",
        'sam = sam_model_registry["vit_b"](checkpoint="PATH/TO/THIS/FOLDER/sam.pth")',
    )
    metric = "iou"
    default_points = "auto"
    missing_evaluation: str | None = "nothing is measured: name annotated images by --evaluate coco:DIR or sa1b:DIR"

    def pixel_reader(self, model: BlockModel) -> PixelReader:
        assert isinstance(model, SamEncoder)
        side = model.sizes.image_size

        def read(record: ImageRecord) -> Tensor:
            pixels: Tensor = prepare(read_pixels(record), side).pixels
            return pixels

        return read
