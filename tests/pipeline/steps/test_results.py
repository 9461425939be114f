"""Results of steps, as commits hold them. A forged value is refused when it is read."""

import json

import pytest
from pydantic import ValidationError

from pipeline.steps.reporting import BlockTraining
from pipeline.steps.results import EvaluateResult, LossRecord, TrainingRecord, ZeroShotResult, judged

TEXT = {"num_tokens": 64, "num_tokens_available": 640, "num_windows": 2, "seqlen": 32, "bos": "stream"}
RESULT = {
    "which": "pruned",
    "source": "pydocs",
    "source_digest": None,
    "metric": "perplexity",
    "value": 20.0,
    "is_partial": False,
    "details": TEXT,
    "bos": {"mode": "stream", "perplexity_without": 21.5, "perplexity_with": None},
}
MASKS = {
    **{"iou_low": 0.4, "iou_high": 0.6, "iou_small": None, "iou_medium": 0.5, "iou_large": 0.5},
    **{"num_small": 0, "num_medium": 2, "num_large": 3, "num_images": 4, "num_masks": 5},
    **{"points": "auto", "skipped": {"without masks": 1}},
}
IOU = {**RESULT, "metric": "iou", "value": 0.5, "details": MASKS, "bos": None}
ACCURACY = {
    **{"which": "dense", "task": "boolq", "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "num_rows": 3},
    **{"num_rows_available": 3, "task_version": "1", "harness_version": "0.4", "is_partial": False, "task_data": None},
}


@pytest.mark.parametrize("result", [RESULT, {**RESULT, "value": None}, {**RESULT, "value": 1.0}, IOU])
def test_a_measurement_is_read_as_it_was_written(result):
    found = EvaluateResult.model_validate(result)
    assert EvaluateResult.model_validate_json(found.model_dump_json()) == found
    assert found.model_dump() == result


@pytest.mark.parametrize(
    "details",
    [
        {"seqlen": {}},
        {"seqlen": []},
        {"seqlen": 0},
        {"num_tokens": "x"},
        {"num_tokens": 10**30},
        {"num_windows": -1},
        {"num_windows": True},
        {"num_cats": 3},
    ],
)
def test_details_of_a_wrong_kind_are_refused(details):
    name = next(iter(details))
    with pytest.raises(ValidationError, match=name):
        EvaluateResult.model_validate({**RESULT, "details": {**TEXT, **details}})


@pytest.mark.parametrize(
    "details", [{"iou_low": -0.1}, {"iou_small": 1.5}, {"num_masks": -1}, {"points": "../x"}, {"skipped": {"x": -1}}]
)
def test_details_of_masks_are_those_of_their_metric(details):
    with pytest.raises(ValidationError, match=next(iter(details))):
        EvaluateResult.model_validate({**IOU, "details": {**MASKS, **details}})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({**RESULT, "value": -5.0}, "perplexity is -5.0"),
        ({**RESULT, "value": 0.5}, "perplexity is 0.5"),
        ({**IOU, "value": 1.5}, "iou is 1.5"),
        ({**RESULT, "metric": "../x"}, "metric"),
        ({**RESULT, "details": [1]}, "details"),
    ],
)
def test_an_impossible_measurement_is_refused(result, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateResult.model_validate(result)


def test_a_measurement_of_a_package_that_is_gone_keeps_its_details():
    found = EvaluateResult.model_validate({**RESULT, "metric": "gone", "value": -5.0, "details": {"cats": [3]}})
    assert found.details.as_json() == {"cats": [3]}
    assert found.model_dump()["details"] == {"cats": [3]}


@pytest.mark.parametrize(
    "metrics",
    [{"acc": 1.2}, {"acc_norm": -0.1}, {"acc, strict": 7.0}, {"acc_stderr": -0.1}, {"ppl_stderr, x": -1.0}],
)
def test_an_impossible_accuracy_is_refused(metrics):
    assert ZeroShotResult.model_validate(ACCURACY).metrics["acc"] == 0.5
    with pytest.raises(ValidationError, match=next(iter(metrics))):
        ZeroShotResult.model_validate({**ACCURACY, "metrics": metrics})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 2.0), (0.5, 1.5), (2.0, 1.5)),
        ((1.0, None), (0.5, None), (1.0, 0.5)),
        ((1.0, 2.0), (0.5, None), (2.0, None)),  # overflowed on the held-out samples: no other loss stands in for it
    ],
)
def test_held_out_samples_judge_a_training_if_there_are_any(before, after, expected):
    records = [{"trained": trained, "held_out": held_out} for trained, held_out in (before, after)]
    fields = {"before": records[0], "after": records[1], "epoch_losses": [], "kept_epoch": 0, "num_steps": 0}
    record = TrainingRecord.model_validate_json(json.dumps(fields), strict=True)
    assert judged(record.before, record.after) == expected
    assert json.loads(record.model_dump_json()) == fields
    for odd in ({**records[0], "extra": 1.0}, {**records[0], "trained": -1.0}):
        with pytest.raises(ValidationError):
            TrainingRecord.model_validate_json(json.dumps({**fields, "before": odd}), strict=True)


def test_a_training_without_epochs_does_not_say_that_none_helped():
    losses = LossRecord(trained=0.5, held_out=None)
    untrained = TrainingRecord(before=losses, after=losses, epoch_losses=(), kept_epoch=0, num_steps=0)
    assert BlockTraining("compensation", untrained).headline == "loss 0.5, not trained"
    in_vain = TrainingRecord(before=losses, after=losses, epoch_losses=(losses,), kept_epoch=0, num_steps=4)
    assert "no epoch improved it" in BlockTraining("compensation", in_vain).headline
