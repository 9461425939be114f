"""Small Segment Anything models, random but reproducible, and folders of annotated pictures to try them on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coding
from torch import nn

from stages.models.sam.checkpoint import write_folder
from stages.models.sam.modules import META_SIZES, SamSizes, build_sam

# Three blocks: windows that do not divide the grid, so that they are padded, and one global block.
SIZES = replace(
    META_SIZES["vit_b"],
    image_size=64,
    patch_size=8,
    embed_dim=32,
    depth=3,
    num_heads=4,
    mlp_dim=64,
    window_size=3,
    global_attn_indexes=(1,),
    prompt_dim=32,
    decoder_mlp_dim=64,
    iou_head_hidden_dim=16,
)


def build(seed: int = 0, sizes: SamSizes = SIZES) -> nn.Module:
    """Random weights everywhere, in the positions, too, which begin as zeros."""
    torch.manual_seed(seed)
    sam = build_sam(sizes)
    with torch.no_grad():
        for weight in sam.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return sam


def save(folder: Path, seed: int = 0, sizes: SamSizes = SIZES) -> Path:
    """As a `SamModel` folder."""
    write_folder(build(seed, sizes).state_dict(), sizes, folder)
    return folder


def picture(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (height, width, 3) of one bright ellipse on noise, and its mask."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:height, 0:width]
    y, x = rng.uniform(0.3, 0.7, 2) * (height, width)
    mask = ((rows - y) / (0.25 * height)) ** 2 + ((cols - x) / (0.2 * width)) ** 2 < 1
    pixels = rng.integers(0, 80, (height, width, 3))
    pixels[mask] += rng.integers(60, 160, 3)
    return pixels.astype(np.uint8), mask


def rle(mask: np.ndarray) -> dict[str, object]:
    coded = coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def coco(folder: Path, count: int = 6, height: int = 48, width: int = 64) -> Path:
    """A folder as `coco:DIR` wants it: one mask an image."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        pixels, mask = picture(number, height, width)
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append({"id": number, "image_id": number, "iscrowd": 0, "segmentation": rle(mask)})
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def sa1b(folder: Path, count: int = 6, height: int = 48, width: int = 64) -> Path:
    """A folder as `sa1b:DIR` wants it."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels, mask = picture(number, height, width)
        Image.fromarray(pixels).save(folder / f"sa_{number}.jpg", quality=95)
        ys, xs = np.nonzero(mask)
        middle = len(ys) // 2
        annotation = {"segmentation": rle(mask), "point_coords": [[float(xs[middle]), float(ys[middle])]]}
        content = {"image": {"height": height, "width": width}, "annotations": [annotation]}
        (folder / f"sa_{number}.json").write_text(json.dumps(content))
    return folder
