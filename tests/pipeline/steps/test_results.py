"""Results of steps, as commits hold them."""

import pytest
from pydantic import ValidationError

from pipeline.steps.results import EvaluateResult

RESULT = {
    "which": "pruned",
    "source": "pydocs",
    "source_digest": None,
    "metric": "perplexity",
    "value": 20.0,
    "is_partial": False,
    "details": {"num_tokens": 64, "seqlen": 32, "num_windows": 2},
}


def test_a_measurement_is_read_as_it_was_written():
    result = EvaluateResult.model_validate(RESULT)
    assert EvaluateResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize(
    "details",
    [{"seqlen": {}}, {"seqlen": []}, {"num_tokens": "x"}, {"num_windows": -1}, {"num_masks": True}, {"points": 3}],
)
def test_details_of_a_wrong_kind_are_refused(details):
    name = next(iter(details))
    with pytest.raises(ValidationError, match=name):
        EvaluateResult.model_validate({**RESULT, "details": {**RESULT["details"], **details}})
