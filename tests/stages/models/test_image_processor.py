"""Pictures become the pixels that the image processors of transformers give, to the last bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from stages.models.image_processor import ImageProcessor
from tests.small_sam import picture

CASES = {
    "vit": (ViTImageProcessorPil, {"size": {"height": 40, "width": 24}}),
    "vit-defaults": (ViTImageProcessorPil, {}),
    "vit-one-number": (ViTImageProcessorPil, {"size": 32, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}),
    "dinov2": (BitImageProcessorPil, {"size": {"shortest_edge": 37}, "crop_size": {"height": 33, "width": 33}}),
    "crop-larger-than-the-picture": (BitImageProcessorPil, {"size": {"shortest_edge": 20}, "crop_size": 33}),
    "clip": (CLIPImageProcessorPil, {"size": 32, "crop_size": 32}),
    "clip-defaults": (CLIPImageProcessorPil, {}),
    "not-resized": (CLIPImageProcessorPil, {"do_resize": False, "crop_size": 40, "do_normalize": False}),
    "not-rescaled": (ViTImageProcessorPil, {"do_rescale": False, "size": 16, "resample": 1}),
}


def processor(folder, kind, settings, file="preprocessor_config.json"):
    folder.mkdir(exist_ok=True)
    named = {"image_processor_type": kind, **settings}
    (folder / file).write_text(json.dumps(named if file.startswith("pre") else {"image_processor": named}))
    return ImageProcessor.of(folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (71, 40), (30, 30), (20, 33)])
def test_pixels_are_those_of_transformers(tmp_path, case, height, width):
    theirs, settings = CASES[case]
    ours = processor(tmp_path / "m", theirs.__name__, settings)
    pixels = picture(1, height, width)[0]
    expected = theirs(**settings)(pixels, return_tensors="pt").pixel_values[0]
    found = ours.pixels(pixels)
    assert found.shape == (3, *ours.size)
    assert torch.equal(found, expected.float())


def test_a_processor_of_images_and_text_keeps_the_same_settings(tmp_path):
    alone = processor(tmp_path / "a", "CLIPImageProcessorFast", {"size": 32, "crop_size": 32})
    assert processor(tmp_path / "b", "CLIPImageProcessor", {"size": 32, "crop_size": 32}, "processor_config.json") == (
        alone
    )


def test_a_picture_whose_longer_side_has_no_end_is_refused(tmp_path):
    ours = processor(tmp_path / "m", "BitImageProcessor", {})
    with pytest.raises(ValueError, match="too narrow"):
        ours.pixels(np.zeros((1, 100, 3), dtype=np.uint8))
