"""Every metric passes the conformance kit; a metric of another package is a line of tables like the built-in ones."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from lampctl.output.comparison import Column
from stages.data.registry import parse_source
from stages.errors import UsageError
from stages.evaluate import evaluate, metric_for, require_measurable
from stages.in_memory import ListScratch, NullCallbacks
from stages.metrics.base import EvaluationProtocol, Measurement, MetricContext
from stages.metrics.details import Details, OpenDetails
from stages.metrics.language import TextDetails
from stages.metrics.perplexity import Perplexity
from stages.metrics.registry import METRICS, figure_text, metric_of, recorded_text
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.tasks.registry import TASKS
from stages.testing.metrics import check_metric
from tests import small_encoders
from tests.blocks import FP32
from tests.small_models import save
from tests.small_sam import coco
from tests.small_sam import save as save_sam


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """A small model and data source for each kind of model."""
    root = tmp_path_factory.mktemp("metrics")
    language = open_model(resolve(str(save(root / "m", "llama"))))
    vision = open_model(resolve(str(save_sam(root / "sam"))))
    coco(root / "images")
    encoder = open_model(resolve(str(small_encoders.save(root / "encoder", "dinov2"))))
    small_encoders.pictures(root / "pictures")
    fixed = EvaluationProtocol(vision.fixed_tokens, points="auto")
    return {
        "language": MetricContext(
            *(language, language, parse_source("pydocs"), EvaluationProtocol(16, 64)),
            *(ListScratch(), FP32, NullCallbacks()),
        ),
        "vision": MetricContext(
            *(vision, vision, parse_source(f"coco:{root / 'images'}"), fixed),
            *(ListScratch(), FP32, NullCallbacks()),
        ),
        "vision-features": MetricContext(
            *(encoder, encoder, parse_source(f"images:{root / 'pictures'}")),
            *(EvaluationProtocol(encoder.fixed_tokens), ListScratch(), FP32, NullCallbacks()),
        ),
    }


@pytest.mark.parametrize("name", METRICS.names)
def test_every_metric_conforms(name, contexts):
    metric = METRICS.get(name)
    assert metric.name == name
    measured = check_metric(metric, contexts[metric.task])
    assert evaluate(contexts[metric.task], name) == measured
    assert evaluate(contexts[metric.task]) == measured  # the usual one of its kind of model


class _Restless(Perplexity):
    calls = 0.0

    def measure(self, context):
        type(self).calls += 1
        return Measurement(self.name, self.calls, context.source.name, False, TextDetails(1, 1, 1, 1))


@dataclass(frozen=True)
class _Silence(Details):
    def described(self, *, is_partial):
        return "windows"


class _Silent(Perplexity):
    details = _Silence

    def measure(self, context):
        return Measurement(self.name, 1.0, context.source.name, True, _Silence())


class _OfAnotherClass(Perplexity):
    details = OpenDetails


class _Impossible(Perplexity):
    most = 1.0


@pytest.mark.parametrize(
    ("metric", "message"), [(_Restless, "and then"), (_Silent, "partial"), (_OfAnotherClass, "another class")]
)
def test_the_kit_names_the_broken_promise(metric, message, contexts):
    with pytest.raises(AssertionError, match=message):
        check_metric(metric, contexts["language"])


def test_the_kit_refuses_a_value_that_the_metric_excludes(contexts):
    with pytest.raises(ValueError, match=r"it must lie in \[1, 1\]"):
        check_metric(_Impossible, contexts["language"])


def test_a_metric_for_another_kind_of_model_is_refused(contexts):
    with pytest.raises(
        UsageError, match="the metric iou measures a model for segmentation; this is a model for language"
    ):
        metric_for("language", "iou")
    with pytest.raises(UsageError, match="no metric is called perplxity"):
        metric_for("language", "perplxity")
    language = contexts["language"]
    with pytest.raises(UsageError, match="lower --eval-seqlen"):
        require_measurable(language.model, language.source, EvaluationProtocol(10**6))


def test_large_values_have_separators_wherever_people_read_them():
    assert figure_text("perplexity", 12345.678) == recorded_text("perplexity", 12345.678) == "12,345.68"
    assert Column("x", "x", "perplexity").shown(12345.678) == "12,345.68"
    assert [figure_text("perplexity", value) for value in (None, math.inf)] == ["-", "infinite"]
    assert [Column("x", "x", "perplexity").shown(value) for value in (None, math.inf)] == ["-", "infinite"]
    assert recorded_text("perplexity", None) == "infinite"


def test_a_result_of_a_package_that_is_gone_can_still_be_shown():
    assert metric_of("gone").title == "gone"
    assert metric_of("gone").task not in TASKS
    assert figure_text("gone", 0.25) == "0.2500"
    details = metric_of("gone").details.from_json({"seqlen": 8, "num_cats": 3})
    assert details.described(is_partial=True) == "num_cats 3, seqlen 8, partial"
    assert details != metric_of("gone").details.from_json({"seqlen": 9, "num_cats": 3})
    assert details.as_json() == {"seqlen": 8, "num_cats": 3}


def test_a_value_that_overflowed_is_null_in_json():
    record = Measurement("perplexity", float("inf"), "s", False, OpenDetails({"seqlen": 8})).record()
    assert record == {"source": "s", "metric": "perplexity", "perplexity": None, "seqlen": 8, "is_partial": False}


def test_titles_need_no_torch():
    code = (
        "import sys; from stages.metrics.registry import METRICS;"
        "print([(entry.title, entry.help) for entry in METRICS.entries()]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.path[0] or None)
    assert done.returncode == 0, done.stderr
    assert torch is not None


class Wrong(Perplexity):
    """A metric of another package whose measurements no commit may hold."""

    name, title = "wrong", "wrong"
    least, most = 0.0, 1.0
    returned: object = None

    def measure(self, context):
        return self.returned


GOOD = TextDetails(num_windows=1, num_tokens=16, num_tokens_available=16, seqlen=16)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned a NoneType"),
        (Measurement("else", 0.5, "pydocs", False, GOOD), "of else on pydocs"),
        (Measurement("wrong", 0.5, "elsewhere", False, GOOD), "on elsewhere, not on pydocs"),
        (Measurement("wrong", 5.0, "pydocs", False, GOOD), r"must lie in \[0, 1\]"),
        (Measurement("wrong", float("nan"), "pydocs", False, GOOD), "wrong is nan"),
        (Measurement("wrong", 0.5, "pydocs", False), "of OpenDetails, not of TextDetails"),
        (Measurement("wrong", 0.5, "pydocs", False, replace(GOOD, num_windows="x")), "num_windows"),
        (Measurement("wrong", 0.5, "pydocs", False, replace(GOOD, num_windows=object())), "JSON"),
    ],
)
def test_a_measurement_that_no_commit_may_hold_is_refused_before_it_is_committed(contexts, returned, said):
    METRICS.register("wrong", type("Wrong", (Wrong,), {"returned": returned}))
    try:
        with pytest.raises(UsageError, match=rf"the metric wrong is broken \(.*{said}.*leave it out of --metrics"):
            evaluate(contexts["language"], "wrong")
    finally:
        METRICS.unregister("wrong")
