"""Images, with or without annotated segmentation masks, as a data source."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from stages.data.base import DataSource
from stages.errors import UsageError
from stages.formats.file_digest import real_path

if TYPE_CHECKING:
    from stages.data.base import SourceDigest

log = logging.getLogger(__name__)

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Annotation:
    """One segmentation mask of an image, as its file has it."""

    segmentation: Any  # run-length code (dict), or polygons (list of lists)
    points: tuple[tuple[float, float], ...]  # x and y in pixels, where the annotation names some (SA-1B)


@dataclass(frozen=True)
class ImageRecord:
    """An image of a source, and its annotations if they have been read."""

    path: Path
    size: tuple[int, int] | None  # (height, width) that its annotations are for; None: there are none
    annotations: tuple[Annotation, ...] = ()


@dataclass
class Skipped:
    """Images that could not be used, counted by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, path: Path) -> None:
        """Count one more image and log its path."""
        self.reasons[reason] += 1
        log.info("passing over %s: %s", path, reason)


class UnusableImageError(Exception):
    """An image cannot be read or does not fit its annotations. The message gives the reason in few words."""


@dataclass(frozen=True)
class ImageSource(DataSource):
    """Images in a folder. A subclass says how they and their annotations are found.

    An image that cannot be used is skipped and counted by reason (`Skipped`).
    """

    contents = "images"
    path = "required"
    path_metavar = "DIR"
    default_sampling = "random"
    has_masks: ClassVar[bool] = True  # whether IoU can be measured on it

    name: str
    folder: Path

    @classmethod
    def named(cls, path: str | None) -> Self:
        folder = real_path(path or "")
        if path and folder.is_file():
            raise UsageError(f"{cls.kind}:{path} is a file: name the folder that it lies in")
        if not path or not folder.is_dir():
            raise UsageError(f"{cls.kind}:{path or ''}: no such folder")
        return cls(f"{cls.kind}:{folder}", folder)

    @property
    def is_local(self) -> bool:
        return True

    def check(self) -> None:
        records, skipped = self.records()
        if not records:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.reasons.items())
            raise UsageError(f"{self.name} holds no image that can be used{f' ({reasons})' if reasons else ''}")

    def digest(self) -> SourceDigest:
        """Number of images and a sha256 over annotations, names and sizes. Pixels are not read."""
        records, _ = self.records()
        listing = hashlib.sha256(self._annotations_digest())
        for record in records:
            name = os.path.relpath(record.path, self.folder).encode("utf-8", "surrogateescape")
            listing.update(name + f"\0{record.path.stat().st_size}\0".encode())
            listing.update(self._annotation_digest(record))
        return {"num_images": len(records), "sha256": listing.hexdigest()}

    @abstractmethod
    def records(self) -> tuple[list[ImageRecord], Skipped]:
        """All usable images in the order of their names, and the count of skipped ones.

        Annotations in a file of their own beside each image are not read yet: see `annotated`.
        """

    def annotated(self, record: ImageRecord) -> ImageRecord:
        """The record with its annotations. Raises UnusableImageError if they cannot be read."""
        return record

    def _annotations_digest(self) -> bytes:
        """What `digest` reads of annotations that all images share."""
        return b""

    def _annotation_digest(self, record: ImageRecord) -> bytes:
        """What `digest` reads of the annotations of one image."""
        return b""

    def _image_files(self) -> tuple[list[Path], Skipped]:
        """All files in the folder that look like images by their names, and the count of broken links."""
        skipped = Skipped()
        try:
            named = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        except OSError as error:
            raise UsageError(f"{self.name} cannot be read: {error.strerror}") from error
        files = []
        for path in named:
            if os.path.isfile(path):  # pathlib would raise for a loop of links
                files.append(path)
            else:
                skipped.add("no file", path)
        return files, skipped


def chosen(records: Sequence[ImageRecord], seed: int, *, is_random: bool) -> list[ImageRecord]:
    """The records in the order in which they are sampled: shuffled with the seed, or as they are."""
    order = list(records)
    if is_random:
        random.Random(seed).shuffle(order)
    return order
