"""How an image model's folder says that pictures become pixels: resized, cropped, rescaled, normalised.

The same numbers as the image processors of transformers on Pillow (`ViTImageProcessor`, `CLIPImageProcessor`,
`BitImageProcessor`), which a test compares. Pillow resizes, so that pixels do not depend on torchvision.

S: pixels on a side.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import UsageError

FILE = "preprocessor_config.json"
_NESTED = "processor_config.json"  # where a processor of images and text keeps the same settings
_KIND = re.compile(r"(ViT|CLIP|Bit)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_STANDARD, _OPENAI_MEAN, _OPENAI_STD = (
    (0.5, 0.5, 0.5),
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CROPPING: dict[str, Any] = {
    **_STEPS,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _OPENAI_MEAN,
    "image_std": _OPENAI_STD,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {
        **_STEPS,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_center_crop": False,
        "crop_size": None,
        "image_mean": _STANDARD,
        "image_std": _STANDARD,
    },
    "CLIP": _CROPPING,
    "Bit": _CROPPING,
}
# Steps that change no pixel of an RGB picture.
_HARMLESS = {"do_convert_rgb"}
_LARGEST = 16_384


@dataclass(frozen=True)
class ImageProcessor:
    """The steps from a picture to pixels, in the order of the fields. Sizes are (height, width)."""

    resized: tuple[int, int] | int | None  # int: the shorter side; None: the picture keeps its size
    resample: int  # Pillow's number of the filter
    cropped: tuple[int, int] | None  # around the centre, with zeros where the picture is smaller
    factor: float | None
    mean: tuple[float, ...] | None  # None: not normalised
    std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path) -> ImageProcessor:
        """The processor that a model folder names.

        Raises:
            UsageError: It names none, or one that is not known here, or pictures would have several sizes.
        """
        named = _settings(folder)
        name = named.get("image_processor_type") or named.get("feature_extractor_type")
        kind = _KIND.fullmatch(name) if isinstance(name, str) else None
        if kind is None:
            raise UsageError(
                f"{folder}: {FILE} names the image processor {name}; known are those of ViT, CLIP and Bit (DINOv2)"
            )
        defaults = _DEFAULTS[kind[1]]
        settings = {**defaults, **{key: named[key] for key in defaults if named.get(key) is not None}}
        beyond = sorted(key for key in named if key.startswith("do_") and key not in defaults and named[key])
        if set(beyond) - _HARMLESS:
            raise UsageError(f"{folder}: {FILE} asks for {beyond[0]}, which is not done here")
        try:
            found = cls(
                _size(settings["size"], is_square=kind[1] == "ViT") if settings["do_resize"] else None,
                int(settings["resample"]),
                _both_sides(_size(settings["crop_size"], is_square=True)) if settings["do_center_crop"] else None,
                float(settings["rescale_factor"]) if settings["do_rescale"] else None,
                _channels(settings["image_mean"]) if settings["do_normalize"] else None,
                _channels(settings["image_std"]),
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"{folder}: {FILE} cannot be used ({error})") from error
        if found.cropped is None and not isinstance(found.resized, tuple):
            raise UsageError(f"{folder}: {FILE} gives pictures of different sizes; one size for all is needed")
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        size = self.cropped or self.resized
        assert isinstance(size, tuple)
        return size

    def pixels(self, picture: np.ndarray) -> Tensor:
        """A picture as the model gets it.

        Args:
            picture: (height, width, 3) uint8.

        Returns:
            (3, *size) float32.

        Raises:
            ValueError: It is so narrow that its longer side would have no end.
        """
        if self.resized is not None:
            picture = _resized(picture, self._target(picture), self.resample)
        if self.cropped is not None:
            picture = _cropped(picture, self.cropped)
        channels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        if self.factor is not None:
            channels = (channels.double() * self.factor).float()
        channels = channels.float()
        if self.mean is not None:
            channels = (channels - _column(self.mean)) / _column(self.std)
        return channels

    def _target(self, picture: np.ndarray) -> tuple[int, int]:
        if isinstance(self.resized, tuple):
            return self.resized
        assert self.resized is not None
        height, width = picture.shape[:2]
        longer = int(self.resized * max(height, width) / min(height, width))
        if longer > _LARGEST:
            raise ValueError("too narrow")
        return (longer, self.resized) if height > width else (self.resized, longer)


def _settings(folder: Path) -> Mapping[str, Any]:
    for name in (FILE, _NESTED):
        try:
            settings = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{folder}: its {name} cannot be read ({error})") from error
        found = settings.get("image_processor") if name == _NESTED and isinstance(settings, dict) else settings
        if isinstance(found, dict):
            return found
    raise UsageError(
        f"{folder} has no {FILE}, which says how pictures become pixels: copy it from the model's page, or save it by "
        "AutoImageProcessor.save_pretrained"
    )


def _size(value: Any, *, is_square: bool) -> tuple[int, int] | int:
    """A size as transformers writes it. is_square: what one number means.

    Raises ValueError, TypeError.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"height", "width"}:
            return (_side(value["height"]), _side(value["width"]))
        if value.keys() == {"shortest_edge"}:
            return _side(value["shortest_edge"])
        raise ValueError(f"a size of {sorted(value)}")
    return (_side(value), _side(value)) if is_square else _side(value)


def _both_sides(size: tuple[int, int] | int) -> tuple[int, int]:
    if isinstance(size, int):
        raise TypeError("a crop has a height and a width")
    return size


def _side(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{value!r} pixels")
    return value


def _channels(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{values} for the three channels")
    return numbers


def _column(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)


def _resized(picture: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling(resample))
    return np.asarray(image)


def _cropped(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, as transformers' `center_crop` takes it."""
    out = np.zeros((*size, picture.shape[2]), dtype=picture.dtype)
    source, target = zip(*(_span(have, want) for have, want in zip(picture.shape[:2], size, strict=True)), strict=True)
    out[target] = picture[source]
    return out


def _span(have: int, want: int) -> tuple[slice, slice]:
    """Along one side: the part of the picture that is kept, and where it lies in the crop."""
    if have >= want:
        start = (have - want) // 2
        return slice(start, start + want), slice(0, want)
    start = (want - have + 1) // 2
    return slice(0, have), slice(start, start + have)
