"""Single-point IoU: against counting by hand, and end to end against Meta's `SamPredictor`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from stages.data.registry import parse_source
from stages.errors import UsageError
from stages.in_memory import ListScratch, NullCallbacks
from stages.machine.device import DeviceChoices
from stages.metrics import single_point_iou as evaluate_masks_module
from stages.metrics.mask_geometry import bootstrap_interval, box_center, interior_point, mask_iou, random_point, size_of
from stages.metrics.single_point_iou import evaluate_masks
from stages.models.registry import open_model
from stages.models.resolve import resolve
from tests.small_sam import build, coco, picture, rle, sa1b, save

ONE = DeviceChoices("cpu", "float32", 1, "highest", "test", batch_tokens=64)
MANY = DeviceChoices("cpu", "float32", 1, "highest", "test", batch_tokens=64 * 4)


def test_iou_is_counted_by_hand():
    one, other = np.zeros((4, 5), dtype=bool), np.zeros((4, 5), dtype=bool)
    one[0, :4] = True
    other[0, 2:] = True
    assert mask_iou(one, other) == 2 / 5
    assert mask_iou(one, one) == 1
    assert mask_iou(np.zeros((2, 2), bool), np.ones((2, 2), bool)) == 0
    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 1


def test_points_lie_where_they_should():
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:16, 7:18] = True
    mask[5:7, 20:38] = True
    assert interior_point(mask) == (12.0, 10.0)
    assert box_center(mask) == (22.0, 10.0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = random_point(mask, rng)
        assert mask[int(y), int(x)]
    whole = np.ones((5, 5), dtype=bool)
    assert interior_point(whole) == (2.0, 2.0)
    for point in (interior_point, box_center):
        with pytest.raises(ValueError, match="empty"):
            point(np.zeros((3, 3), dtype=bool))


def test_sizes_are_cocos():
    assert [size_of(area) for area in (1, 32**2 - 1, 32**2, 96**2 - 1, 96**2)] == [
        "small",
        "small",
        "medium",
        "medium",
        "large",
    ]


def test_the_interval_draws_images_not_masks():
    rng = np.random.default_rng(1)
    # 40 images of 25 masks that are all alike: as uncertain as 40 numbers.
    levels = rng.normal(size=40)
    values, groups = np.repeat(levels, 25), np.repeat(np.arange(40), 25)
    low, high = bootstrap_interval(values, groups)
    plain = 2 * 1.96 * levels.std() / np.sqrt(40)
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(plain, rel=0.1)


def by_predictor(folder, seed: int, point_of) -> list[float]:
    """The same figure by Meta's own predictor, a point at a time."""
    predictor = SamPredictor(build(seed))
    content = json.loads((folder / "instances.json").read_text())
    values = []
    for image in content["images"]:
        pixels = np.asarray(Image.open(folder / "images" / image["file_name"]).convert("RGB"))
        predictor.set_image(pixels)
        for annotation in content["annotations"]:
            if annotation["image_id"] != image["id"] or annotation["iscrowd"]:
                continue
            mask = picture(image["id"], image["height"], image["width"])[1]
            masks, quality, _ = predictor.predict(np.array([point_of(mask)]), np.array([1]), multimask_output=True)
            found = masks[quality.argmax()]
            values.append((found & mask).sum() / (found | mask).sum())
    return values


@pytest.mark.parametrize("choices", [ONE, MANY])
def test_it_is_what_metas_predictor_gives(tmp_path, choices):
    folder = coco(tmp_path / "c", 5, 37, 64)
    model, source = open_model(resolve(str(save(tmp_path / "sam", 2)))), parse_source(f"coco:{folder}")
    figures = evaluate_masks(model, source, "auto", None, ListScratch(), choices, NullCallbacks())
    expected = by_predictor(folder, 2, interior_point)
    assert figures.iou == pytest.approx(np.mean(expected), abs=1e-6)
    assert 0 < figures.iou < 1
    assert figures.details.num_masks == figures.details.num_images == 5
    assert figures.details.num_small + figures.details.num_medium + figures.details.num_large == 5
    assert not figures.is_partial


@pytest.mark.long
def test_the_annotations_own_point_is_taken(tmp_path):
    model = open_model(resolve(str(save(tmp_path / "sam"))))
    source = parse_source(f"sa1b:{sa1b(tmp_path / 's', 3)}")
    kinds = ("auto", "annotation", "interior", "random", "box-center")
    results = {kind: evaluate_masks(model, source, kind, None, ListScratch(), ONE, NullCallbacks()) for kind in kinds}
    assert results["auto"].iou == results["annotation"].iou
    again = evaluate_masks(model, source, "random", None, ListScratch(), ONE, NullCallbacks())
    assert again == results["random"]
    plain = parse_source(f"coco:{coco(tmp_path / 'c', 2)}")
    with pytest.raises(UsageError, match="name no points"):
        evaluate_masks(model, plain, "annotation", None, ListScratch(), ONE, NullCallbacks())


@pytest.mark.long
def test_what_cannot_be_used_is_counted(tmp_path):
    folder = coco(tmp_path / "c", 6)
    content = json.loads((folder / "instances.json").read_text())
    (folder / "images" / "000.png").write_bytes(b"no picture")
    content["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": "??"}
    content["annotations"][2]["segmentation"] = rle(np.zeros((48, 64), dtype=bool))
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "images" / "004.png").unlink()
    model = open_model(resolve(str(save(tmp_path / "sam"))))
    figures = evaluate_masks(model, parse_source(f"coco:{folder}"), "auto", None, ListScratch(), ONE, NullCallbacks())
    assert figures.details.num_masks == figures.details.num_images == 1
    assert figures.details.skipped == {
        "broken": 1,
        "masks that cannot be read": 1,
        "masks that are empty": 1,
        "without masks": 1,
        "annotated, but missing": 1,
    }
    few = evaluate_masks(
        model, parse_source(f"coco:{coco(tmp_path / 'd', 4)}"), "auto", 2, ListScratch(), ONE, NullCallbacks()
    )
    assert few.is_partial
    assert few.details.num_images == 2


def test_no_mask_at_all_is_an_error(tmp_path):
    folder = coco(tmp_path / "c", 2)
    (folder / "instances.json").write_text(
        json.dumps({**json.loads((folder / "instances.json").read_text()), "annotations": []})
    )
    model = open_model(resolve(str(save(tmp_path / "sam"))))
    with pytest.raises(UsageError, match="none of 2 images"):
        evaluate_masks(model, parse_source(f"coco:{folder}"), "auto", None, ListScratch(), ONE, NullCallbacks())


class _StoppedError(Exception):
    """As a signal stops a step."""


class _Stopping(NullCallbacks):
    """Keeps a checkpoint at every boundary, and stops at the n-th."""

    def __init__(self, kept, after: int) -> None:
        super().__init__()
        self.kept, self.left = kept, after

    def restore(self):
        return self.kept

    def checkpoint(self, make) -> None:
        self.kept = make()
        self.left -= 1
        if self.left == 0:
            raise _StoppedError


@pytest.mark.long
def test_stopped_anywhere_it_ends_with_the_same_figures_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_masks_module, "_IMAGES_AT_ONCE", 2)
    folder = coco(tmp_path / "c", 5)
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": "??"}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    (folder / "instances.json").write_text(json.dumps(content))
    model, source = open_model(resolve(str(save(tmp_path / "sam")))), parse_source(f"coco:{folder}")
    quiet = evaluate_masks(model, source, "auto", None, ListScratch(), ONE, NullCallbacks())
    assert quiet.details.skipped == {"masks that cannot be read": 1, "without masks": 1}
    kept, stops, after = None, 0, 1
    while True:
        callbacks = _Stopping(kept, after)
        try:
            found = evaluate_masks(model, source, "auto", None, ListScratch(), ONE, callbacks)
            break
        except _StoppedError:
            kept, stops, after = callbacks.kept, stops + 1, after + 3
    assert stops > 3
    assert found == quiet


@pytest.mark.parametrize("point", [[float("nan"), 1.0], [1e300, 0.0], [1e6, -1e6]])
def test_a_point_that_lies_nowhere_is_counted_not_measured(tmp_path, point):
    folder = sa1b(tmp_path / "s", 3)
    content = json.loads((folder / "sa_1.json").read_text())
    content["annotations"][0]["point_coords"] = [point]
    (folder / "sa_1.json").write_text(json.dumps(content))
    model = open_model(resolve(str(save(tmp_path / "sam"))))
    figures = evaluate_masks(model, parse_source(f"sa1b:{folder}"), "auto", None, ListScratch(), ONE, NullCallbacks())
    assert figures.details.num_masks == 2
    assert figures.details.skipped == {"masks whose point lies outside of the image": 1}
