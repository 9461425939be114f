"""What tasks on images have in common: pictures are drawn from a folder, and become pixels as the model has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from stages.data.base import DataSource
from stages.data.drawing import Drawing
from stages.data.image_source import ImageRecord, ImageSource, Skipped, UnusableImageError, chosen
from stages.errors import UsageError
from stages.interfaces import Watcher
from stages.metrics.points import Points
from stages.models.base import BlockModel
from stages.tasks.base import Drawn
from stages.tasks.registry import require_readable
from stages.training.end_loss import EndLoss, RelativeError

# Reads a picture as the model gets it, (3, S, S). Raises UnusableImageError.
PixelReader = Callable[[ImageRecord], Tensor]


class ImageTask(ABC):
    """Base of `stages.tasks.base.Task`s on images."""

    reads_text: ClassVar[bool] = False
    contents: ClassVar[str] = "images"
    loader_dtype: ClassVar[str] = "float32"  # pictures come in fp32
    end_loss: ClassVar[type[EndLoss]] = RelativeError
    default_calibration: ClassVar[str | None] = None
    default_evaluation: ClassVar[tuple[str, ...]] = ()
    default_points: ClassVar[Points | None] = None
    missing_calibration: ClassVar[str] = (
        "--calibration is missing: name images, as sa1b:DIR (an archive of SA-1B, unpacked), coco:DIR or images:DIR"
    )

    @abstractmethod
    def pixel_reader(self, model: BlockModel) -> PixelReader:
        """How pictures become this model's pixels."""

    def default_sampling(self, calibration: str) -> str:
        return "random"

    def require_samples(self, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
        records, _ = _images(source, model).records()
        needed = drawing.skip + drawing.num_samples
        if len(records) < needed:
            raise UsageError(
                f"{source.name} has {len(records)} images, {needed} are needed: lower {drawing.flag}"
                + (" or --calibration-skip" if drawing.skip else "")
            )

    def draw(self, model: BlockModel, source: DataSource, drawing: Drawing, watcher: Watcher) -> Drawn:
        records, skipped = _images(source, model).records()
        read, needed = self.pixel_reader(model), drawing.skip + drawing.num_samples
        order = chosen(records, drawing.seed, is_random=drawing.sampling == "random")
        usable = _usable(order, needed, read, skipped)
        if len(usable) < needed:
            raise UsageError(
                f"{source.name} holds {len(usable)} pictures that can be read ({_listed(skipped)}), "
                f"{needed} are needed: " + (f"lower {drawing.flag}" if usable else "name a folder of pictures")
            )
        drawn = usable[drawing.skip :]
        return Drawn(_Pictures(drawn, read), len(drawn), "images", dict(skipped.reasons))


class _Pictures:
    """Preprocessed images (3, S, S), each read when it is asked for."""

    def __init__(self, records: list[ImageRecord], read: PixelReader) -> None:
        self._records, self._read = records, read

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._read(self._records[index])


def _usable(order: list[ImageRecord], count: int, read: PixelReader, skipped: Skipped) -> list[ImageRecord]:
    """The first `count` records whose pictures can be read; the others are counted."""
    found: list[ImageRecord] = []
    for record in order:
        if len(found) == count:
            break
        try:
            read(record)
        except UnusableImageError as error:
            skipped.add(str(error), record.path)
            continue
        found.append(record)
    return found


def _listed(skipped: Skipped) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.reasons.items())) or "none passed over"


def _images(source: DataSource, model: BlockModel) -> ImageSource:
    require_readable(source, model)
    assert isinstance(source, ImageSource)
    return source
