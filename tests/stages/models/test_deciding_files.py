"""A run resumes only on the files that it began with."""

import pytest

from stages.models.deciding_files import changed_files, decides

BEFORE = {"config.json": "a", "model.safetensors": "b", "preprocessor_config.json": "c"}


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tekken.json", "qwen.tiktoken", "x.safetensors"]
)
def test_what_decides_ids_pixels_or_weights_is_recorded(name):
    assert decides(name, trusts_code=False)


def test_code_decides_only_where_it_may_be_run():
    assert decides("modeling.py", trusts_code=True)
    assert not decides("modeling.py", trusts_code=False)
    assert not decides("README.md", trusts_code=True)


@pytest.mark.parametrize("name", BEFORE)
def test_a_recorded_file_that_is_changed_or_gone_is_named(name):
    assert changed_files(BEFORE, {**BEFORE, name: "z"}) == [name]
    assert changed_files(BEFORE, {key: value for key, value in BEFORE.items() if key != name}) == [name]


def test_a_new_file_is_named_unless_earlier_versions_did_not_record_its_kind():
    assert changed_files(BEFORE, BEFORE) == []
    assert changed_files(BEFORE, {**BEFORE, "tokenizer.json": "n"}) == ["tokenizer.json"]
    assert changed_files(BEFORE, {**BEFORE, "tekken.json": "n", "qwen.tiktoken": "n"}) == []
