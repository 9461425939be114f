"""Single-point IoU of a Segment Anything model, original or pruned, with one block in memory at a time.

S: pixels on a side.    G: patches on a side.    C: channels of the encoder.    P: points.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.data.image_decoding import Prepared, decode_mask, prepare, read_pixels
from stages.data.image_source import Annotation, ImageRecord, ImageSource, UnusableImageError
from stages.errors import NumericalError, UsageError
from stages.interfaces import Callbacks, Checkpoint, Scratch, Stream
from stages.machine.device import DeviceChoices, computing
from stages.metrics.block_passes import Shaped, num_passes, through_blocks
from stages.metrics.mask_details import MaskDetails
from stages.metrics.mask_geometry import bootstrap_interval, box_center, interior_point, mask_iou, random_point, size_of
from stages.metrics.points import Points
from stages.models.sam.encoder import SamEncoder, SamEnds
from stages.runtime.prefetch import Reading

# Images that pass through a block before the next is loaded.
_IMAGES_AT_ONCE = 64
# Points that share a pass of the mask decoder, and numbers of full-size masks that are in memory at once.
_POINTS_AT_ONCE, _MASK_NUMBERS_AT_ONCE = 32, 32_000_000


@dataclass(frozen=True)
class MaskScore:
    """How one annotated mask was met."""

    image: int
    iou: float
    area: int  # of the annotated mask, in pixels of the image
    quality: float  # as the model predicts it


@dataclass(frozen=True)
class MaskMeasurement:
    """The mean IoU, and of what."""

    iou: float
    is_partial: bool  # a limit left images out
    details: MaskDetails


@torch.no_grad()
def evaluate_masks(
    model: SamEncoder,
    source: ImageSource,
    points: Points,
    max_images: int | None,
    scratch: Scratch,
    choices: DeviceChoices,
    callbacks: Callbacks,
) -> MaskMeasurement:
    """Mean IoU over all annotated masks of the images, one point each.

    points: where the point is (`stages.metrics.points.Points`); "auto" takes the annotation's own where it has one and
    the interior point otherwise. Images that cannot be used are passed over and counted. Stopped, it resumes after
    the last group of images. Raises UsageError where no mask is left to measure.
    """
    records, skipped = source.records()
    num_available = len(records)
    records = records[:max_images] if max_images is not None else records
    measuring = _Measuring(model, source, points, records, choices, callbacks)
    group = min(_IMAGES_AT_ONCE, max(len(records), 1))
    sizes = model.sizes
    stream = scratch.stream("hidden", group, (sizes.grid, sizes.grid, sizes.embed_dim), choices.torch_dtype)
    for start in range(measuring.num_seen, len(records), group):
        measuring.measure(range(start, min(start + group, len(records))), stream)
    scores = measuring.scores
    if not scores:
        raise UsageError(f"{source.name}: none of {len(records)} images has a mask that can be measured")
    skipped.reasons.update(measuring.skipped)
    mean = float(np.mean([score.iou for score in scores]))
    return MaskMeasurement(mean, num_available > len(records), _details(scores, points, dict(skipped.reasons)))


def _details(scores: Sequence[MaskScore], points: Points, skipped: dict[str, int]) -> MaskDetails:
    values, images = [score.iou for score in scores], [score.image for score in scores]
    low, high = bootstrap_interval(values, images)
    by_size: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
    for score in scores:
        by_size[size_of(score.area)].append(score.iou)
    means = {size: float(np.mean(found)) if found else None for size, found in by_size.items()}
    return MaskDetails(
        iou_low=low,
        iou_high=high,
        iou_small=means["small"],
        iou_medium=means["medium"],
        iou_large=means["large"],
        num_small=len(by_size["small"]),
        num_medium=len(by_size["medium"]),
        num_large=len(by_size["large"]),
        num_images=len(set(images)),
        num_masks=len(scores),
        points=points,
        skipped=skipped,
    )


class _Pictures:
    """Preprocessed images as `Samples`, read when they are asked for; one that fails is zeros and noted."""

    def __init__(self, records: Sequence[ImageRecord], side: int) -> None:
        self._records, self._side = records, side
        self.prepared: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        self.failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Tensor:
        try:
            picture: Prepared = prepare(read_pixels(self._records[index]), self._side)
        except UnusableImageError as error:
            self.failed[index] = str(error)
            return torch.zeros(3, self._side, self._side)
        self.prepared[index] = (picture.input_size, picture.original_size)
        pixels: Tensor = picture.pixels
        return pixels


class _Measuring:
    """The masks that are measured, and how the next ones are."""

    def __init__(
        self,
        model: SamEncoder,
        source: ImageSource,
        points: str,
        records: Sequence[ImageRecord],
        choices: DeviceChoices,
        callbacks: Callbacks,
    ) -> None:
        self.model, self.source, self.points, self.records = model, source, points, records
        self.choices, self.callbacks, self.device = choices, callbacks, choices.torch_device
        self.scores: list[MaskScore] = []
        self.skipped: dict[str, int] = {}
        self.num_seen = 0
        self._passed_over: Counter[str] = Counter()  # in the group at hand
        self._new: list[MaskScore] = []  # of the group at hand
        listing = "\0".join(str(record.path) for record in records)
        self._data = hashlib.sha256(f"{source.digest()}\0{points}\0{listing}".encode()).hexdigest()
        restored = callbacks.restore()
        if restored is not None and restored.figures["data"] == self._data:
            self.scores = [MaskScore(*score) for score in restored.figures["scores"]]
            self.skipped, self.num_seen = restored.figures["skipped"], restored.figures["num_seen"]
        self._passes = num_passes(model)
        self._done = self.num_seen * self._passes

    def measure(self, numbers: Sequence[int], stream: Stream) -> None:
        """Add the scores of these images, no more than the stream holds."""
        self._passed_over = Counter()
        found = []
        for number in numbers:
            try:
                found.append((number, self.source.annotated(self.records[number])))
            except UnusableImageError as error:
                self._skip(str(error))
        with_masks = [(number, record) for number, record in found if record.annotations]
        for _ in range(len(found) - len(with_masks)):
            self._skip("without masks")
        if with_masks:
            self._measure([number for number, _ in with_masks], [record for _, record in with_masks], stream)
        self._done += (len(numbers) - len(with_masks)) * self._passes
        # Together, and only once the group is done: a checkpoint before that begins it anew.
        self.num_seen += len(numbers)
        self.skipped = dict(Counter(self.skipped) + self._passed_over)
        self.scores = [*self.scores, *self._new]
        self._new = []

    def _skip(self, reason: str) -> None:
        self._passed_over[reason] += 1

    def _measure(self, numbers: Sequence[int], records: Sequence[ImageRecord], stream: Stream) -> None:
        pictures = _Pictures(records, self.model.sizes.image_size)
        side = self.model.sizes.image_size
        samples = (pictures, Shaped(len(records), (3, side, side)))
        through_blocks(self.model, samples, stream, self.choices, self._boundary, self._advance)
        ends = self.model.load_ends(self.device, part="leave")
        new: list[MaskScore] = []
        failed = dict(pictures.failed)
        with Reading([[place] for place in range(len(records))], (stream,), self.device) as read:
            for (place,), (hidden,) in read:
                self._boundary()
                if place not in failed:
                    sizes = pictures.prepared[place]
                    new += self._scores_of(numbers[place], records[place], ends, hidden, *sizes)
                so_far = [score.iou for score in (*self.scores, *new)]
                if so_far:
                    self._advance(1, iou=float(np.mean(so_far)))
                else:
                    self._advance()
        for reason in failed.values():
            self._skip(reason)
        self._new = new

    def _scores_of(
        self,
        number: int,
        record: ImageRecord,
        ends: SamEnds,
        hidden: Tensor,
        input_size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> list[MaskScore]:
        """One score for each annotated mask of an image; masks that are empty or cannot be read are counted."""
        with computing(self.choices):
            embedding = ends.leave(hidden, hidden).float()
        asked: list[tuple[np.ndarray, tuple[float, float]]] = []
        for place, annotation in enumerate(record.annotations):
            try:
                mask = decode_mask(annotation.segmentation, original_size)
            except UnusableImageError as error:
                self._skip(f"masks {str(error).removeprefix('with a mask ')}")
                continue
            if not mask.any():
                self._skip("masks that are empty")
                continue
            point = _point_of(annotation, mask, self.points, (number, place))
            if not (0 <= point[0] <= original_size[1] and 0 <= point[1] <= original_size[0]):
                self._skip("masks whose point lies outside of the image")
                continue
            asked.append((mask, point))
        at_once = min(_POINTS_AT_ONCE, max(_MASK_NUMBERS_AT_ONCE // (original_size[0] * original_size[1]), 1))
        scores = []
        for start in range(0, len(asked), at_once):
            some = asked[start : start + at_once]
            found, quality = ends.best_masks(embedding, [point for _, point in some], input_size, original_size)
            if not torch.isfinite(quality).all():
                raise NumericalError(f"{self.model.source.name} answers with numbers that are not finite")
            for (mask, _), one, predicted in zip(some, found.numpy(), quality.tolist(), strict=True):
                scores.append(MaskScore(number, mask_iou(one, mask), int(mask.sum()), predicted))
        return scores

    def _boundary(self) -> None:
        self.callbacks.checkpoint(
            lambda: Checkpoint(
                figures={
                    "data": self._data,
                    "scores": [[s.image, s.iou, s.area, s.quality] for s in self.scores],
                    "skipped": self.skipped,
                    "num_seen": self.num_seen,
                }
            )
        )

    def _advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self.callbacks.report(self._done, len(self.records) * self._passes, "images", **figures)


def _point_of(annotation: Annotation, mask: np.ndarray, points: str, seed: tuple[int, int]) -> tuple[float, float]:
    """x and y, in pixels of the image, of the point that asks for a mask.

    seed: of an image and a mask in it, so that a point drawn by chance is always the same. Raises UsageError where
    the annotation is to name it and does not.
    """
    if points in ("auto", "annotation") and annotation.points:
        return annotation.points[0]
    if points == "annotation":
        raise UsageError("--eval-points annotation: these annotations name no points, as those of SA-1B do; use auto")
    if points == "random":
        return random_point(mask, np.random.default_rng(seed))
    if points == "box-center":
        return box_center(mask)
    return interior_point(mask)
