"""A few pictures, the point that asks in each, and the mask that a Segment Anything model answers with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.data.image_decoding import decode_mask, prepare, read_pixels
from stages.data.image_source import ImageSource, UnusableImageError
from stages.interfaces import Watcher
from stages.machine.device import DeviceChoices, computing
from stages.metrics.mask_geometry import interior_point, mask_iou
from stages.models.sam.encoder import SamEncoder


@dataclass(frozen=True)
class Asked:
    """A picture with its largest annotated mask, and the interior point of that."""

    pixels: np.ndarray  # (height, width, 3) uint8
    point: tuple[float, float]  # x, y
    mask: np.ndarray  # (height, width) bool


@dataclass(frozen=True)
class Answer:
    """What a model makes of it."""

    mask: np.ndarray  # (height, width) bool
    iou: float


def asked_of(source: ImageSource, count: int) -> list[Asked]:
    """The first pictures of a source that have a mask; fewer if there are no more."""
    found: list[Asked] = []
    for listed in source.records()[0]:
        if len(found) == count:
            break
        try:
            record = source.annotated(listed)
            pixels = read_pixels(record)
            size = (pixels.shape[0], pixels.shape[1])
            masks = [decode_mask(annotation.segmentation, size) for annotation in record.annotations]
        except UnusableImageError:
            continue  # the evaluation counts these
        largest = max(masks, key=np.count_nonzero, default=None)
        if largest is not None and largest.any():
            found.append(Asked(pixels, interior_point(largest), largest))
    return found


@torch.no_grad()
def answers_to(model: SamEncoder, asked: list[Asked], choices: DeviceChoices, watcher: Watcher) -> list[Answer]:
    """The mask of the best predicted quality for each picture, with one block in memory at a time."""
    device = choices.torch_device
    prepared = [prepare(one.pixels, model.sizes.image_size) for one in asked]
    ends = model.load_ends(device, part="enter")
    with computing(choices):
        entries = [ends.enter(one.pixels[None].to(device)) for one in prepared]
        hidden = [entry.hidden for entry in entries]
        for index in range(model.num_blocks):
            watcher.check_stop()
            block = model.load_block(index, device)
            hidden = [
                model.run_block(block, state, entry.calls[index]) for state, entry in zip(hidden, entries, strict=True)
            ]
            watcher.report(index + 1, model.num_blocks, "blocks")
        ends = model.load_ends(device, part="leave")
        embeddings = [ends.leave(state, state).float() for state in hidden]
    answers = []
    for one, picture, embedding in zip(asked, prepared, embeddings, strict=True):
        found, _ = ends.best_masks(embedding, [one.point], picture.input_size, picture.original_size)
        mask = found[0].numpy()
        answers.append(Answer(mask, mask_iou(mask, one.mask)))
    return answers
