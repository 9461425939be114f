"""Short names of steps for people."""

import pytest

from lampctl.output.labels import step_label


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("prune-block/3", "prune-block/3"),
        ("evaluate/pruned/wikitext2@2048:4096", "evaluate/pruned/wikitext2@2048:4096"),
        ("evaluate/dense/text:/data/a/notes.txt@64", "evaluate/dense/text:notes.txt@64"),
        ("evaluate/pruned/images:/data/unseen@17", "evaluate/pruned/images:unseen"),
        ("evaluate/pruned/images:/data/unseen@17:2", "evaluate/pruned/images:unseen (first 2)"),
        ("evaluate/pruned/images:/data/unseen@17:sharpness", "evaluate/pruned/images:unseen:sharpness"),
        ("evaluate/pruned/coco:/data/val@center:100", "evaluate/pruned/coco:val@center:100"),
        ("evaluate/pruned/gone:/data/x@17", "evaluate/pruned/gone:x@17"),
    ],
)
def test_a_step_is_named_by_what_people_chose(name, label):
    assert step_label(name) == label
