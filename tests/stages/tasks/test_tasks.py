"""Every task passes the conformance kit with one of its models."""

from __future__ import annotations

import pytest

from stages.data.registry import parse_source
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.tasks.language import Language
from stages.tasks.registry import TASKS
from stages.testing.tasks import check_task
from stages.training.end_loss import Divergence, LossAndGradient
from tests import small_encoders, small_models, small_sam

pytestmark = pytest.mark.long


@pytest.fixture
def cases(tmp_path):
    text, images = parse_source("pydocs"), parse_source(f"coco:{small_sam.coco(tmp_path / 'c', 5)}")
    language = open_model(resolve(str(small_models.save(tmp_path / "l", "llama-gqa"))))
    vision = open_model(resolve(str(small_sam.save(tmp_path / "v"))))
    encoder = open_model(resolve(str(small_encoders.save(tmp_path / "e", "clip"))))
    plain = parse_source(f"images:{small_encoders.pictures(tmp_path / 'p')}")
    return {
        "language": (language, text, images),
        "vision": (vision, images, text),
        "vision-features": (encoder, plain, text),
    }


@pytest.mark.parametrize("name", TASKS.names)
def test_every_task_passes_the_kit(cases, name):
    check_task(name, *cases[name])


def test_the_kit_sees_a_task_that_ignores_skip(cases):
    class Forgetful(Language):
        def draw(self, model, source, drawing, watcher):
            return super().draw(model, source, type(drawing)(**{**vars(drawing), "skip": 0}), watcher)

    with pytest.raises(AssertionError, match="skip does not leave out the first sample"):
        check_task(Forgetful, *cases["language"])


def test_the_kit_sees_an_end_loss_that_says_nothing(cases):
    class Constant(Divergence):
        @staticmethod
        def of(ends, inputs, hidden, target, vocab_size, *, needs_gradient, dense_ends=None):
            return LossAndGradient(0.0, hidden)

    class Indifferent(Language):
        end_loss = Constant

    with pytest.raises(AssertionError, match=r"kl is 0\.0 for another output"):
        check_task(Indifferent, *cases["language"])
