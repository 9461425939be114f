"""Features of pictures, of a model and of the original one, with one block in memory at a time.

S: pixels on a side.    F: numbers of a picture's features.    n: pictures of a group.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.data.base import require_contents
from stages.data.image_decoding import processed
from stages.data.image_source import ImageRecord, ImageSource, UnusableImageError
from stages.errors import NumericalError, UsageError
from stages.interfaces import Checkpoint, Stream
from stages.machine.device import computing
from stages.metrics.base import MetricContext
from stages.metrics.block_passes import Shaped, num_passes, through_blocks
from stages.models.base import BlockModel
from stages.models.image_encoder import ImageEncoder
from stages.runtime.prefetch import Reading

# Images that pass through a block before the next is loaded.
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class FeatureCosines:
    """How well the features of each picture agree with those of the original model."""

    cosines: tuple[float, ...]
    is_partial: bool  # a limit left pictures out
    skipped: dict[str, int]  # pictures that could not be used, by reason

    @property
    def mean(self) -> float:
        """Over pictures."""
        return math.fsum(self.cosines) / len(self.cosines)


@torch.no_grad()
def feature_cosines(context: MetricContext) -> FeatureCosines:
    """Compare the features of all pictures of a source. Stopped, it resumes after the last group of pictures.

    Raises:
        UsageError: No picture is left to measure.
        NumericalError: Features are not finite.
    """
    require_contents(context.source, ImageSource.contents, context.model)
    assert isinstance(context.source, ImageSource)
    records, skipped = context.source.records()
    measuring = _Measuring(context, records[: context.protocol.max_images])
    measuring.measure_all()
    if not measuring.cosines:
        raise UsageError(f"{context.source.name}: none of {len(records)} pictures can be read")
    skipped.reasons.update(measuring.skipped)
    is_partial = len(measuring.records) < len(records)
    return FeatureCosines(tuple(measuring.cosines), is_partial, dict(skipped.reasons))


class _Pictures:
    """Preprocessed images (3, S, S) as `Samples`; one that cannot be read is zeros and noted."""

    def __init__(self, records: Sequence[ImageRecord], model: ImageEncoder) -> None:
        self._records, self._processor = records, model.processor
        self.failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Tensor:
        try:
            return processed(self._records[index], self._processor)
        except UnusableImageError as error:
            self.failed[index] = str(error)
            return torch.zeros(3, *self._processor.size)


class _Measuring:
    """The pictures that are measured, and how the next ones are."""

    def __init__(self, context: MetricContext, records: Sequence[ImageRecord]) -> None:
        assert isinstance(context.original, ImageEncoder)
        self.records, self.cosines, self.num_seen = records, list[float](), 0
        self.skipped: Counter[str] = Counter()
        self._context, self._original, self._model = context, context.original, context.model
        # The original is compared with itself: once is enough.
        self._models = list({id(model): model for model in (self._original, self._model)}.values())
        listing = "\0".join(str(record.path) for record in records)
        self._data = hashlib.sha256(f"{context.source.digest()}\0{listing}".encode()).hexdigest()
        restored = context.callbacks.restore()
        if restored is not None and restored.figures["data"] == self._data:
            self.cosines, self.num_seen = restored.figures["cosines"], restored.figures["num_seen"]
            self.skipped = Counter(restored.figures["skipped"])
        self._passes = sum(map(num_passes, self._models))
        self._done = self.num_seen * self._passes

    def measure_all(self) -> None:
        """Measure the pictures that are left, a group at a time."""
        group = max(min(_IMAGES_AT_ONCE, len(self.records)), 1)
        pixels = (3, *self._original.processor.size)
        shape = self._original.hidden_shape(pixels)
        stream = self._context.scratch.stream("hidden", group, shape, self._context.device.torch_dtype)
        for start in range(self.num_seen, len(self.records), group):
            pictures = _Pictures(self.records[start : start + group], self._original)
            shaped = Shaped(len(pictures), pixels)
            found = []
            for model in self._models:
                samples = (pictures, shaped)
                through_blocks(model, samples, stream, self._context.device, self._boundary, self._advance)
                found.append(self._features(model, shaped, stream))
            usable = [place for place in range(len(pictures)) if place not in pictures.failed]
            new = _cosines(found[0][usable], found[-1][usable])
            # Together, and only once the group is done: a checkpoint before that begins it anew.
            self.cosines = [*self.cosines, *new]
            self.skipped += Counter(pictures.failed.values())
            self.num_seen += len(pictures)

    def _features(self, model: BlockModel, shaped: Shaped, stream: Stream) -> Tensor:
        """The features (n, F) of the last block's outputs, in fp32."""
        device = self._context.device.torch_device
        ends, found = model.load_ends(device, part="leave"), []
        with Reading([[place] for place in range(len(shaped))], (shaped, stream), device) as read:
            for _, (pixels, hidden) in read:
                self._boundary()
                with computing(self._context.device):
                    features = ends.leave(pixels, hidden)
                if not torch.isfinite(features).all():
                    raise NumericalError(f"{model.source.name} answers with numbers that are not finite")
                found.append(features.float().cpu())
                self._advance(1)
        return torch.cat(found)

    def _boundary(self) -> None:
        self._context.callbacks.checkpoint(
            lambda: Checkpoint(
                figures={
                    "data": self._data,
                    "cosines": self.cosines,
                    "skipped": dict(self.skipped),
                    "num_seen": self.num_seen,
                }
            )
        )

    def _advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self._context.callbacks.report(self._done, len(self.records) * self._passes, "images", **figures)


def _cosines(dense: Tensor, other: Tensor) -> list[float]:
    """The cosine of each pair of rows, in [-1, 1]; both are (n, F)."""
    found: list[float] = torch.cosine_similarity(dense.double(), other.double(), dim=1).clamp(-1, 1).tolist()
    return found
