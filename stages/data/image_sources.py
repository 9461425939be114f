"""Images with annotated masks: COCO's layout, SA-1B's, or a folder of pictures without masks.

    coco:DIR     instances.json (or annotations/instances_*.json) and the images, in DIR or a folder below
    sa1b:DIR     sa_123.jpg with sa_123.json beside it, as the archives of SA-1B are
    images:DIR   pictures alone, for calibration

An image that cannot be used is passed over, and counted by why: `Skipped`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.formats.file_digest import digest_file, local_path

log = logging.getLogger(__name__)

KINDS = ("coco", "sa1b", "images")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# What PIL's readers raise for damaged files, beside errors of its own.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error)


@dataclass(frozen=True)
class Annotation:
    """One mask of an image, as its file has it."""

    segmentation: Any  # run-length code (dict), or polygons (list of lists)
    points: tuple[tuple[float, float], ...]  # x and y in pixels, where the annotation names some (SA-1B)


@dataclass(frozen=True)
class ImageRecord:
    """An image that may be used."""

    path: Path
    size: tuple[int, int] | None  # (height, width) that its annotations are for; None: there are none
    annotations: tuple[Annotation, ...] = ()


@dataclass
class Skipped:
    """Images that could not be used, counted by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, path: Path) -> None:
        """One more; the log names it."""
        self.reasons[reason] += 1
        log.info("passing over %s: %s", path, reason)


class UnusableImageError(Exception):
    """An image that cannot be read or does not fit its annotations; says why in few words."""


@dataclass(frozen=True)
class ImageSource:
    """A set of images that a user named."""

    name: str  # canonical: the folder is absolute
    kind: str
    folder: Path

    is_local = True
    task = "vision"

    @property
    def has_masks(self) -> bool:
        """Whether IoU can be measured on it."""
        return self.kind != "images"

    def check(self) -> None:
        """Raise UsageError unless it can be read and holds an image."""
        records, skipped = self.records()
        if not records:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.reasons.items())
            raise UsageError(f"{self.name} holds no image that can be used{f' ({reasons})' if reasons else ''}")

    def digest(self) -> dict[str, str | int]:
        """Number of images and a sha256 over annotations, names and sizes (pictures themselves may be terabytes)."""
        records, _ = self.records()
        listing = hashlib.sha256()
        if self.kind == "coco":
            listing.update(digest_file(self._instances).sha256.encode())
        for record in records:
            name = os.path.relpath(record.path, self.folder).encode("utf-8", "surrogateescape")
            listing.update(name + f"\0{record.path.stat().st_size}\0".encode())
            if self.kind == "sa1b":
                listing.update(f"{record.path.with_suffix('.json').stat().st_size}\0".encode())
        return {"num_images": len(records), "sha256": listing.hexdigest()}

    def records(self) -> tuple[list[ImageRecord], Skipped]:
        """All images in the order of their names, annotations of SA-1B not read yet, and what was passed over."""
        return _listed(self)

    def annotated(self, record: ImageRecord) -> ImageRecord:
        """The record with its annotations. Raises UnusableImageError if they cannot be read."""
        if self.kind != "sa1b":
            return record
        return _sa1b_record(record.path)

    @cached_property
    def _instances(self) -> Path:
        places = [self.folder / "instances.json", *sorted(self.folder.glob("annotations/instances_*.json"))]
        found = [place for place in places if place.is_file()]
        if not found:
            raise UsageError(f"{self.name}: neither instances.json nor annotations/instances_*.json is there")
        if len(found) > 1:
            names = ", ".join(str(place.relative_to(self.folder)) for place in found)
            raise UsageError(f"{self.name} has several files of annotations ({names}): keep the one that is meant")
        return found[0]


def parse_image_source(name: str) -> ImageSource:
    """The source that `name` (KIND:DIR) names. Raises UsageError if there is no such folder."""
    kind, _, rest = name.partition(":")
    folder = local_path(rest).resolve()
    if not rest or not folder.is_dir():
        raise UsageError(f"{name}: no such folder")
    return ImageSource(f"{kind}:{folder}", kind, folder)


def chosen(records: Sequence[ImageRecord], seed: int, *, is_random: bool) -> list[ImageRecord]:
    """The records in the order in which they are drawn: by chance, or as they come."""
    order = list(records)
    if is_random:
        random.Random(seed).shuffle(order)
    return order


def read_pixels(record: ImageRecord) -> np.ndarray:
    """The picture, (height, width, 3) uint8: turned as its EXIF says, unless its annotations are for it as it lies.

    Grey, palette, CMYK and 16-bit pictures become RGB. Raises UnusableImageError.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(record.path) as image:
            image.load()
            lies = (image.height, image.width)
            turned = ImageOps.exif_transpose(image)
            if record.size is not None and (turned.height, turned.width) != record.size:
                if lies != record.size:
                    raise UnusableImageError("of another size than its annotations say")
                turned = image
            if turned.mode[0] in "IF":  # 16 or 32 bits, or floating point: PIL would only cut off
                return np.repeat(_eight_bits(np.asarray(turned, dtype=np.float64))[:, :, None], 3, axis=2)
            return np.asarray(turned.convert("RGB"))
    except FileNotFoundError as error:
        raise UnusableImageError("missing") from error
    except (*_BROKEN, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UnusableImageError("broken") from error


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey levels as 0 to 255: of floats up to 1, of 16-bit numbers, or as they are."""
    highest = float(grey.max()) if grey.size else 0.0
    if not math.isfinite(highest):
        raise UnusableImageError("broken")
    scale = 255.0 if highest <= 1 else 1.0 if highest <= 255 else 1 / 257.0
    levels: np.ndarray = np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8)
    return levels


def decode_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask (height, width) bool of an annotation: run lengths, compressed or not, or polygons.

    Raises UnusableImageError if it is neither, or for another size.
    """
    from pycocotools import mask as coding

    height, width = size
    try:
        if isinstance(segmentation, list):
            _require_plain(segmentation, size)
            coded = coding.merge(coding.frPyObjects(segmentation, height, width))
        else:
            _require_runs(segmentation, size)
            coded = segmentation
            if isinstance(segmentation["counts"], list):
                coded = coding.frPyObjects(segmentation, height, width)
        if sum(_run_lengths(coded["counts"])) != height * width:
            raise ValueError("the runs do not fill the mask")
        decoded = coding.decode(coded)
    except ValueError as error:
        raise UnusableImageError("with a mask that cannot be read") from error
    mask: np.ndarray = decoded.astype(bool)
    return mask


def _require_plain(polygons: list[Any], size: tuple[int, int]) -> None:
    """Raise ValueError for polygons that the library must not be given: it crashes, or fills the memory."""
    farthest = 20 * (max(size) + 1)
    if not polygons:
        raise ValueError("no polygon")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon has three corners at least")
        if not all(isinstance(x, int | float) and abs(x) <= farthest for x in polygon):
            raise ValueError("a corner that lies nowhere near the image")


def _require_runs(segmentation: Any, size: tuple[int, int]) -> None:
    """Check the form of a run-length code, as the library does not.

    Raises ValueError; UnusableImageError for a code of another size.
    """
    if not isinstance(segmentation, dict) or not segmentation.keys() >= {"counts", "size"}:
        raise ValueError("neither polygons nor a run-length code")
    if not isinstance(segmentation["size"], list | tuple):
        raise ValueError("the size is no list")
    if tuple(segmentation["size"]) != size:
        raise UnusableImageError("with a mask of another size")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(isinstance(run, int | float) and 0 <= run <= size[0] * size[1] for run in counts):
            raise ValueError("a run that is no number, or longer than the mask")
    elif not isinstance(counts, str | bytes):
        raise ValueError("the runs are neither a list nor a code")


def _run_lengths(counts: str | bytes) -> list[int]:
    """The runs of COCO's compressed code: numbers of 5 bits a character, each but the first two as a difference.

    The library decodes whatever it is given, even what does not fill the mask. Raises ValueError.
    """
    code = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    place = 0
    while place < len(code):
        value, shift, more = 0, 0, True
        while more:
            if place == len(code):
                raise ValueError("the code ends inside a run")
            bits = code[place] - 48
            if not 0 <= bits < 64:
                raise ValueError("a character that is no part of the code")
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            shift += 5
            place += 1
        if bits & 0x10:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("a run of negative length")
        runs.append(value)
    return runs


def _listed(source: ImageSource) -> tuple[list[ImageRecord], Skipped]:
    if source.kind == "coco":
        return _coco_records(source)
    skipped = Skipped()
    try:
        named = sorted(path for path in source.folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise UsageError(f"{source.name} cannot be read: {error.strerror}") from error
    files = []
    for path in named:
        if os.path.isfile(path):  # where a link leads nowhere, pathlib raises
            files.append(path)
        else:
            skipped.add("no file", path)
    if source.kind == "images":
        return [ImageRecord(path, None) for path in files], skipped
    records = []
    for path in files:
        if path.with_suffix(".json").is_file():
            records.append(ImageRecord(path, None))
        else:
            skipped.add("without annotations", path)
    pictured = {path.with_suffix(".json") for path in files}
    for path in sorted(source.folder.rglob("*.json")):
        if path not in pictured:
            skipped.add("annotated, but missing", path)
    return records, skipped


def _coco_records(source: ImageSource) -> tuple[list[ImageRecord], Skipped]:
    path, skipped = source._instances, Skipped()
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        images, annotations = content["images"], content["annotations"]
        grouped: dict[Any, list[Annotation]] = {}
        for entry in annotations:
            # A crowd is a region of many objects: no point asks for it.
            if not entry.get("iscrowd"):
                grouped.setdefault(entry["image_id"], []).append(Annotation(entry["segmentation"], ()))
        found = []
        for image in sorted(images, key=lambda image: str(image["file_name"])):
            name = str(image["file_name"])
            size = (int(image["height"]), int(image["width"]))
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                skipped.add("named outside of the folder", Path(name[:200]))
                continue
            place = _image_place(source.folder, path, name)
            if place is None:
                skipped.add("annotated, but missing", source.folder / name[:200])
            else:
                found.append(ImageRecord(place, size, tuple(grouped.get(image["id"], ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as COCO annotations ({type(error).__name__}: {error})") from error
    return found, skipped


def _image_place(folder: Path, instances: Path, name: str) -> Path | None:
    split = instances.stem.removeprefix("instances_")
    for place in (folder / name, folder / "images" / name, folder / split / name, folder / "images" / split / name):
        if os.path.isfile(place):  # False, too, for a name that no file system takes
            return place
    return None


def _sa1b_record(path: Path) -> ImageRecord:
    try:
        content: Mapping[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8-sig"))
        size = (int(content["image"]["height"]), int(content["image"]["width"]))
        annotations = tuple(
            Annotation(entry["segmentation"], tuple((float(x), float(y)) for x, y in entry.get("point_coords", ())))
            for entry in content["annotations"]
            if not entry.get("iscrowd")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UnusableImageError("with annotations that cannot be read") from error
    return ImageRecord(path, size, annotations)


@dataclass(frozen=True)
class Prepared:
    """A picture as the model gets it."""

    pixels: Any  # (3, S, S) float32 tensor: resized, normalised, padded
    input_size: tuple[int, int]  # (height, width) of the resized picture, before padding
    original_size: tuple[int, int]


def prepare(pixels: np.ndarray, side: int) -> Prepared:
    """Meta's preprocessing: longest side resized to `side`, pixels normalised, zeros to the right and below.

    Raises UnusableImageError for a picture so narrow that nothing of it is left.
    """
    import torch
    from segment_anything.utils.transforms import ResizeLongestSide
    from torch.nn.functional import pad

    from stages.models.sam.modules import PIXEL_MEAN, PIXEL_STD

    if min(pixels.shape[:2]) * side < 0.5 * max(pixels.shape[:2]):
        raise UnusableImageError("too narrow")
    resized = torch.from_numpy(np.ascontiguousarray(ResizeLongestSide(side).apply_image(pixels)))
    channels = resized.permute(2, 0, 1).float()
    normalised = (channels - torch.tensor(PIXEL_MEAN).view(-1, 1, 1)) / torch.tensor(PIXEL_STD).view(-1, 1, 1)
    height, width = normalised.shape[1:]
    padded = pad(normalised, (0, side - width, 0, side - height))
    return Prepared(padded, (height, width), (pixels.shape[0], pixels.shape[1]))
