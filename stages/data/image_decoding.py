"""Images as arrays: pictures read from files, segmentation masks decoded, and the preprocessing of Segment Anything."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.data.image_source import ImageRecord, UnusableImageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.image_processor import ImageProcessor

# What PIL's readers raise for damaged files, in addition to their own errors.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error)


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


def processed(record: ImageRecord, processor: ImageProcessor) -> Tensor:
    """A picture as an image encoder gets it, (3, S, S). Raises UnusableImageError."""
    picture = read_pixels(record)
    try:
        return processor.pixels(picture)
    except ValueError as error:
        raise UnusableImageError(str(error)) from error
