"""The vision examples: scenes are what their masks say, training learns and goes on, pictures are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from stages.data.image_decoding import decode_mask
from stages.data.registry import parse_source
from tests.small_sam import save

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    """The scripts import each other by their bare names."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def scenes():
    import drawn_scenes

    return drawn_scenes


@pytest.fixture
def torch_unchanged():
    """Undo what a script sets for the whole process."""
    num_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(precision)


def call(script: ModuleType, monkeypatch, *arguments: object) -> None:
    """Call the main function of a script in this process."""
    monkeypatch.setattr("sys.argv", [script.__file__, *map(str, arguments)])
    script.main()


def test_a_scene_is_always_the_same_and_its_masks_do_not_overlap(scenes):
    for number in range(5):
        scene, again = scenes.draw(number), scenes.draw(number)
        assert np.array_equal(scene.image, again.image)
        assert scene.masks.sum(axis=0).max() <= 1
        assert all(mask.sum() >= scenes.SMALLEST for mask in scene.masks)
    assert not np.array_equal(scenes.draw(0).image, scenes.draw(scenes.UNSEEN).image)


def test_scenes_are_written_as_coco_has_them(scenes, tmp_path):
    scenes.write_coco(tmp_path / "c", range(3))
    records, skipped = parse_source(f"coco:{tmp_path / 'c'}").records()
    assert not skipped.reasons
    for record in records:
        scene = scenes.draw(int(record.path.stem))
        masks = [decode_mask(annotation.segmentation, record.size) for annotation in record.annotations]
        assert np.array_equal(np.stack(masks), scene.masks)
        assert np.array_equal(np.asarray(Image.open(record.path)), scene.image)


@pytest.mark.parametrize(("images", "points"), [(1, 2), pytest.param(6, 10, marks=pytest.mark.slow)])
def test_training_writes_a_model_that_opens(tmp_path, monkeypatch, capsys, torch_unchanged, images, points):
    import train_sam_tiny

    monkeypatch.setattr(train_sam_tiny, "IMAGES", images)
    monkeypatch.setattr(train_sam_tiny, "POINTS", points)
    out = tmp_path / "sam"
    written = ("--out", out, "--checkpoint", tmp_path / "c.pt")
    call(train_sam_tiny, monkeypatch, "--steps", 2, *written, "--unseen", 2)
    assert "single-point IoU on 2 unseen scenes" in capsys.readouterr().out
    from stages.models.registry import open_model
    from stages.models.resolve import resolve

    model = open_model(resolve(str(out)))
    assert model.num_blocks == json.loads((out / "config.json").read_text())["vision_config"]["num_hidden_layers"]
    assert (out / "model.safetensors").stat().st_size <= 8_000_000


def test_answers_are_drawn_side_by_side(tmp_path, monkeypatch):
    import sam_predict

    folders = [save(tmp_path / f"m{seed}", seed) for seed in (0, 1)]
    call(sam_predict, monkeypatch, *folders, "--titles", "one,other", "--scenes", 2, "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.width > 3 * 384
        assert drawn.height > 2 * 384
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(photo)
    call(sam_predict, monkeypatch, *folders, "--image", photo, "--point", "20,30", "--out", tmp_path / "y.png")
    assert (tmp_path / "y.png").stat().st_size > 1000
