"""Scenes for sam-tiny: textured shapes that overlap on textured ground, drawn together with their exact masks.

    python examples/drawn_scenes.py FOLDER --count 64     # images and instances.json, as COCO lays them out

Everything about a scene follows from its number, so that training and unseen scenes can be told apart: numbers below
`UNSEEN` are for training, those from there on for evaluation and calibration.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZE = 128  # pixels on a side
UNSEEN = 10_000_000
SMALLEST = 48  # visible pixels of a shape that counts


@dataclass(frozen=True)
class Scene:
    """image: (SIZE, SIZE, 3) uint8. masks: (shapes, SIZE, SIZE) bool, the visible part of each, from back to front."""

    image: np.ndarray
    masks: np.ndarray


def draw(number: int) -> Scene:
    """The scene of this number, always the same."""
    rng = np.random.default_rng(number)
    rows, cols = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    image = _texture(rng, rows, cols, _colour(rng))
    owner = np.full((SIZE, SIZE), -1)
    for shape in range(rng.integers(2, 9)):
        inside = _shape(rng, rows, cols)
        image = np.where(inside[..., None], _texture(rng, rows, cols, _colour(rng)), image)
        owner[inside] = shape
    light = 1 + rng.uniform(-0.25, 0.25) * (cols / SIZE - 0.5) + rng.uniform(-0.25, 0.25) * (rows / SIZE - 0.5)
    image = image * light[..., None] + rng.normal(0, rng.uniform(0, 8), image.shape)
    masks = [owner == shape for shape in range(owner.max() + 1)]
    kept = [mask for mask in masks if mask.sum() >= SMALLEST]
    stacked = np.stack(kept) if kept else np.zeros((0, SIZE, SIZE), dtype=bool)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), stacked)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(20, 235, 3).astype(np.float32)


def _texture(rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3): one colour with stripes, checks, dots, clouds or nothing on it."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
    along = (cols * np.cos(angle) + rows * np.sin(angle)) * (2 * np.pi / period)
    across = (rows * np.cos(angle) - cols * np.sin(angle)) * (2 * np.pi / period)
    kind = rng.integers(5)
    if kind == 0:
        wave = np.zeros_like(rows)
    elif kind == 1:
        wave = np.sin(along)
    elif kind == 2:
        wave = np.sign(np.sin(along) * np.sin(across))
    elif kind == 3:
        wave = np.where(np.sin(along) + np.sin(across) > 1.0, 1.0, -0.3)
    else:
        coarse = rng.normal(size=(9, 9)).astype(np.float32)
        wave = _smooth(coarse, rows, cols)
    tint = rng.uniform(-1, 1, 3) * rng.uniform(10, 45)
    return colour + wave[..., None] * tint.astype(np.float32)


def _smooth(coarse: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """A small grid of numbers, drawn out to the size of the image by bilinear interpolation."""
    scale = (len(coarse) - 1) / (SIZE - 1)
    y, x = rows * scale, cols * scale
    top, left = np.minimum(y.astype(int), len(coarse) - 2), np.minimum(x.astype(int), len(coarse) - 2)
    dy, dx = y - top, x - left
    upper = coarse[top, left] * (1 - dx) + coarse[top, left + 1] * dx
    lower = coarse[top + 1, left] * (1 - dx) + coarse[top + 1, left + 1] * dx
    smooth: np.ndarray = upper * (1 - dy) + lower * dy
    return smooth


def _shape(rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: an ellipse, a box, a polygon, a star or a blob, anywhere and turned anyhow."""
    centre = rng.uniform(0.08, 0.92, 2) * SIZE
    radius = SIZE * np.exp(rng.uniform(np.log(0.08), np.log(0.33)))
    turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 1.0)
    dy, dx = rows - centre[0], cols - centre[1]
    x = (dx * np.cos(turn) + dy * np.sin(turn)) / radius
    y = (dy * np.cos(turn) - dx * np.sin(turn)) / (radius * squeeze)
    kind = rng.integers(5)
    if kind == 0:
        inside: np.ndarray = x**2 + y**2 < 1
        return inside
    if kind == 1:
        return np.maximum(abs(x), abs(y)) < 0.85
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    if kind == 2:  # a regular polygon
        corners = rng.integers(3, 8)
        step = 2 * np.pi / corners
        edge = np.cos(step / 2) / np.cos((angle % step) - step / 2)
    elif kind == 3:  # a star
        points = rng.integers(4, 8)
        edge = 0.7 + 0.3 * np.cos(points * angle)
    else:  # a blob
        edge = np.full_like(angle, 0.75)
        for wave in range(2, 6):
            edge = edge + rng.normal(0, 0.25 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return distance < edge


def write_coco(folder: Path, numbers: range) -> None:
    """The scenes as PNG files and an `instances.json` with run-length masks."""
    from PIL import Image
    from pycocotools import mask as rle

    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id, number in enumerate(numbers, start=1):
        scene = draw(number)
        name = f"{number}.png"
        Image.fromarray(scene.image).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for mask in scene.masks:
            coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": [float(x) for x in rle.toBbox(coded)],
                    "segmentation": {"size": coded["size"], "counts": coded["counts"].decode()},
                }
            )
    described = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}
    (folder / "instances.json").write_text(json.dumps(described))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--first", type=int, default=UNSEEN, help="number of the first scene")
    options = parser.parse_args()
    write_coco(options.folder, range(options.first, options.first + options.count))
