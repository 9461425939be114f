"""Every model family that transformers has, from `lampctl run` to the exported model."""

import re
from pathlib import Path

import pytest

from tests.census.families import CENSUS
from tests.census.journey import FLAGS, check_export, saved


@pytest.mark.parametrize("entry", CENSUS, ids=lambda entry: entry.name)
def test_a_model_of_each_family_is_pruned_and_exported_or_refused_by_name(entry, lampctl, tmp_path, words):
    source = saved(entry, tmp_path / entry.name)
    answer = lampctl("run", source, *FLAGS, "--run-dir", "r", "--baseline", "wanda")
    if entry.verdict.word == "refused":
        assert answer.code == 2, answer.err
        assert re.search(entry.verdict.message, answer.err), answer.err
        assert not Path("r").exists()
        return
    assert answer.code == 0, answer.err
    check_export(source, Path("r"))
    check_export(source, Path("r-wanda"))
