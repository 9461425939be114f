"""Folders of pictures: what is read, how it is turned and converted, and what is passed over."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from stages.data import image_decoding as images
from stages.data.image_decoding import decode_mask, prepare, read_pixels
from stages.data.image_source import ImageRecord, UnusableImageError, chosen
from stages.data.registry import parse_source
from stages.errors import UsageError
from tests.small_sam import coco, picture, rle, sa1b


def test_polygons_and_run_lengths_of_one_shape_are_one_mask():
    square = np.zeros((20, 30), dtype=bool)
    square[4:10, 5:17] = True
    polygon = [[5, 4, 17, 4, 17, 10, 5, 10]]
    runs = rle(square)
    counts, value, column_major = [0], False, square.T.ravel()
    for pixel in column_major:
        if pixel == value:
            counts[-1] += 1
        else:
            counts.append(1)
            value = pixel
    uncompressed = {"size": [20, 30], "counts": counts}
    for segmentation in (polygon, runs, uncompressed):
        assert np.array_equal(decode_mask(segmentation, (20, 30)), square)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 2]],
        {"counts": "??", "size": [20, 30]},
        {"counts": [5], "size": [3, 3]},
        7,
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[float("nan"), 0, 10, 0, 10, 10]],
        [[0, 0, "a", 1, 2, 2]],
        "abc",
        [3],
        [None],
        {},
        {"size": [20, 30]},
        {"counts": "0"},
        {"counts": [600], "size": 20},
        {"counts": [600], "size": ["a", "b"]},
        {"counts": None, "size": [20, 30]},
        {"counts": {}, "size": [20, 30]},
        {"counts": ["a"], "size": [20, 30]},
        {"counts": [-1, 601], "size": [20, 30]},
        {"counts": [10**30], "size": [20, 30]},
        {"counts": [float("inf")], "size": [20, 30]},
        {"counts": "o", "size": [20, 30]},
        {"counts": "\ud800", "size": [20, 30]},
    ],
)
def test_masks_that_cannot_be_read_say_so(segmentation):
    """Some of these crash the library, or fill the memory, if it is given them."""
    with pytest.raises(UnusableImageError):
        decode_mask(segmentation, (20, 30))


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, IndexError, AssertionError])
def test_a_bug_of_ours_is_no_picture_that_cannot_be_read(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error("ours")

    monkeypatch.setattr(images, "_run_lengths", fail)
    monkeypatch.setattr(images, "_eight_bits", fail)
    with pytest.raises(error, match="ours"):
        decode_mask([[5, 4, 17, 4, 17, 10, 5, 10]], (20, 30))
    Image.fromarray(np.ones((6, 8), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(error, match="ours"):
        read_pixels(ImageRecord(tmp_path / "x.tif", None))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_damaged_files_are_read_or_say_so(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(picture(0, 24, 32)[0]).save(path)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(min(len(damaged), chance.randrange(1, 9))):
            damaged[chance.randrange(min(len(damaged), chance.choice([64, 10**9])))] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UnusableImageError):
            read_pixels(ImageRecord(path, None))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray((np.arange(48).reshape(6, 8) * 1300).astype(np.uint16))
    else:
        image = Image.fromarray(picture(0, 6, 8)[0]).convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("L", "CMYK") else "x.png")
    image.save(path)
    pixels = read_pixels(ImageRecord(path, None))
    assert pixels.shape == (6, 8, 3)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 30


def test_a_turned_picture_lies_as_its_annotations_want_it(tmp_path):
    pixels, _ = picture(1, 10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert read_pixels(ImageRecord(tmp_path / "turned.png", None)).shape == (20, 10, 3)
    assert read_pixels(ImageRecord(tmp_path / "turned.png", (20, 10))).shape == (20, 10, 3)
    as_it_lies = read_pixels(ImageRecord(tmp_path / "turned.png", (10, 20)))
    assert np.array_equal(as_it_lies, pixels)
    with pytest.raises(UnusableImageError, match="another size"):
        read_pixels(ImageRecord(tmp_path / "turned.png", (11, 20)))


def test_preprocessing_is_metas(tmp_path):
    from segment_anything import SamPredictor

    from tests.small_sam import build

    sam = build()
    predictor, pixels = SamPredictor(sam), picture(3, 37, 50)[0]
    seen = []
    sam.image_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    predictor.set_image(pixels)
    prepared = prepare(pixels, 64)
    assert torch.equal(prepared.pixels, seen[0][0])
    assert prepared.input_size == predictor.input_size
    assert prepared.original_size == predictor.original_size


def test_sources_list_what_can_be_used(tmp_path):
    source = parse_source(f"coco:{coco(tmp_path / 'c')}")
    records, skipped = source.records()
    assert len(records) == 6
    assert all(record.size == (48, 64) and len(record.annotations) == 1 for record in records)
    assert not skipped.reasons
    assert source.digest() == source.digest()
    (tmp_path / "c" / "images" / "000.png").unlink()
    assert source.records()[1].reasons == {"annotated, but missing": 1}
    assert source.digest()["num_images"] == 5


def test_crowds_are_dropped(tmp_path):
    folder = coco(tmp_path / "c", 1)
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"].append({**content["annotations"][0], "id": 9, "iscrowd": 1})
    (folder / "instances.json").write_text(json.dumps(content))
    (record,) = parse_source(f"coco:{folder}").records()[0]
    assert len(record.annotations) == 1


def test_sa1b_has_points_and_counts_what_has_no_partner(tmp_path):
    folder = sa1b(tmp_path / "s", 3)
    (folder / "sa_0.jpg").unlink()
    (folder / "sa_1.json").unlink()
    source = parse_source(f"sa1b:{folder}")
    records, skipped = source.records()
    assert [record.path.name for record in records] == ["sa_2.jpg"]
    assert skipped.reasons == {"annotated, but missing": 1, "without annotations": 1}
    assert source.annotated(records[0]).annotations[0].points
    (folder / "sa_2.json").write_text("{")
    with pytest.raises(UnusableImageError, match="cannot be read"):
        source.annotated(records[0])


def test_wrong_names_say_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        parse_source("coco:nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"neither instances\.json"):
        parse_source(f"coco:{tmp_path / 'empty'}").check()
    with pytest.raises(UsageError, match="holds no image"):
        parse_source(f"images:{tmp_path / 'empty'}").check()
    (tmp_path / "empty" / "instances.json").write_text('{"images": 3}')
    with pytest.raises(UsageError, match="cannot be read as COCO"):
        parse_source(f"coco:{tmp_path / 'empty'}").check()


def test_the_choice_follows_the_seed(tmp_path):
    records, _ = parse_source(f"coco:{coco(tmp_path / 'c')}").records()
    first, again, other = (chosen(records, seed, is_random=True) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert chosen(records, 0, is_random=False) == records


def test_odd_folders_are_passed_over_and_counted(tmp_path):
    folder = coco(tmp_path / "c", 2)
    content = json.loads((folder / "instances.json").read_text())
    for number, name in enumerate(("../outside.png", "/etc/passwd", "x" * 5000), start=10):
        content["images"].append({"id": number, "file_name": name, "height": 5, "width": 5})
    (folder / "instances.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    (tmp_path / "outside.png").write_bytes((folder / "images" / "000.png").read_bytes())
    source = parse_source(f"coco:{folder}")
    records, skipped = source.records()
    assert len(records) == 2
    assert skipped.reasons == {"named outside of the folder": 2, "annotated, but missing": 1}
    plain = tmp_path / "p"
    plain.mkdir()
    (plain / "broken.jpg").symlink_to("nowhere")
    (plain / "loop.jpg").symlink_to("loop.jpg")
    Image.new("RGB", (4000, 1)).save(plain / "line.png")
    records, skipped = parse_source(f"images:{plain}").records()
    assert skipped.reasons == {"no file": 2}
    assert parse_source(f"images:{plain}").digest()["num_images"] == 1
    with pytest.raises(UnusableImageError, match="too narrow"):
        prepare(read_pixels(records[0]), 64)
    (folder / "instances.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="cannot be read as COCO"):
        parse_source(f"coco:{folder}").check()


def test_grey_levels_keep_their_range(tmp_path):
    for values, name in (([0.0, 0.5, 1.0], "f.tif"), ([0, 128, 255], "i.tif")):
        kind = np.float32 if name == "f.tif" else np.int32
        Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / name)
        assert read_pixels(ImageRecord(tmp_path / name, None))[0, :, 0].tolist() == [0, 128, 255]
