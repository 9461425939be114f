"""Segment Anything: images in, single-point IoU out."""

from __future__ import annotations

from torch import Tensor

from stages.data.base import DataSource, require_task
from stages.data.drawing import Drawing
from stages.data.image_decoding import prepare, read_pixels
from stages.data.image_source import ImageRecord, ImageSource, Skipped, UnusableImageError, chosen
from stages.errors import UsageError
from stages.metrics.points import Points
from stages.models.base import BlockModel
from stages.models.sam.encoder import SamEncoder
from stages.tasks.base import Drawn


class Vision:
    """A `stages.tasks.base.Task`."""

    name = "vision"
    title = "segmentation"
    help = "Segment Anything: images, single-point IoU."
    reads_text = False
    loader = "SamModel"
    loader_dtype = "float32"  # pictures come in fp32
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
    default_calibration: str | None = None
    default_evaluation: tuple[str, ...] = ()
    default_points: Points | None = "auto"
    missing_calibration = (
        "--calibration is missing: name images, as sa1b:DIR (an archive of SA-1B, unpacked), coco:DIR or images:DIR"
    )
    missing_evaluation: str | None = "nothing is measured: name annotated images by --evaluate coco:DIR or sa1b:DIR"

    def default_sampling(self, calibration: str) -> str:
        return "random"

    def require_samples(self, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
        records, _ = _images(source, model).records()
        needed = drawing.skip + drawing.num_samples
        if len(records) < needed:
            raise UsageError(
                f"{source.name} has {len(records)} images, {needed} are needed: lower --num-samples"
                + (" or --calibration-skip" if drawing.skip else "")
            )

    def draw(self, model: BlockModel, source: DataSource, drawing: Drawing) -> Drawn:
        images = _images(source, model)
        assert isinstance(model, SamEncoder)
        records, skipped = images.records()
        order = chosen(records, drawing.seed, is_random=drawing.sampling == "random")
        usable = _usable(order, drawing.skip + drawing.num_samples, model.sizes.image_size, skipped)
        if len(usable) < drawing.skip + drawing.num_samples:
            raise UsageError(
                f"{source.name} holds {len(usable)} pictures that can be read ({_listed(skipped)}), "
                f"{drawing.skip + drawing.num_samples} are needed: "
                + ("lower --num-samples" if usable else "name a folder of pictures")
            )
        drawn = usable[drawing.skip :]
        return Drawn(_Pictures(drawn, model.sizes.image_size), len(drawn), "images", dict(skipped.reasons))


class _Pictures:
    """Preprocessed images (3, S, S), each read when it is asked for."""

    def __init__(self, records: list[ImageRecord], side: int) -> None:
        self._records, self._side = records, side

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Tensor:
        pixels: Tensor = prepare(read_pixels(self._records[index]), self._side).pixels
        return pixels


def _usable(order: list[ImageRecord], count: int, side: int, skipped: Skipped) -> list[ImageRecord]:
    """The first `count` records whose pictures can be read; the others are counted."""
    found: list[ImageRecord] = []
    for record in order:
        if len(found) == count:
            break
        try:
            prepare(read_pixels(record), side)
        except UnusableImageError as error:
            skipped.add(str(error), record.path)
            continue
        found.append(record)
    return found


def _listed(skipped: Skipped) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.reasons.items())) or "none passed over"


def _images(source: DataSource, model: BlockModel) -> ImageSource:
    require_task(source, model)
    assert isinstance(source, ImageSource)
    return source
