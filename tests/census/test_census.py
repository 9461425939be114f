"""Every model family that transformers has, from `lampctl run` to the exported model."""

import re
import signal
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import warm_python
from tests.census.configuration import Configuration, tiny
from tests.census.families import CENSUS, ONE_OF_EACH, TYPE_OF
from tests.census.journey import check_export, flags_for
from tests.census.verdicts import NOT_TAKEN
from tests.conftest import PRUNING_ALONE
from tests.killed_runs import BOMB, exported_weights

ENTRIES = {entry.name: entry for entry in CENSUS}


@pytest.fixture
def journey(lampctl, tmp_path, words):
    """Takes an entry through a run, and checks what the table says of it."""

    def go(entry, *more):
        source = entry.save(tmp_path / "source")
        flags = (source, *flags_for(entry, tmp_path), *more)
        answer = lampctl("run", *flags, "--run-dir", "r", "--baseline", "wanda")
        verdict = entry.verdict
        if verdict.word == "works":
            assert answer.code == 0, answer.err
            check_export(entry, source, Path("r"))
            check_export(entry, source, Path("r-wanda"))
        else:
            assert answer.code == 2, f"{entry.name} works now, or fails in another way: {answer.err}"
            assert re.search(verdict.message, answer.err), answer.err
            assert not Path("r").exists()
        return flags

    return go


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_model_of_each_kind_is_pruned_and_exported_or_refused_by_name(name, journey):
    journey(ENTRIES[name], *PRUNING_ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("entry", CENSUS, ids=lambda entry: entry.name)
def test_every_model_is_pruned_exported_and_resumed_after_a_kill_or_refused_by_name(entry, journey, lampctl):
    flags = journey(entry)
    if entry.verdict.word == "works":
        killed = warm_python.run(BOMB, "compensate-block", "run", *map(str, flags), "--run-dir", "killed")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resumed = lampctl("resume", "killed")
        assert resumed.code == 0, resumed.err
        assert exported_weights(Path("killed")) == exported_weights(Path("r"))


def test_the_census_has_each_kind_and_each_name_once():
    assert len(ENTRIES) == len(CENSUS) >= 55
    assert {ENTRIES[name].kind for name in ONE_OF_EACH} == {entry.kind for entry in CENSUS}
    refused = [entry.verdict for entry in CENSUS if entry.verdict.word == "refused"]
    assert refused
    assert all(verdict.message and verdict.reason for verdict in refused)


def test_every_causal_language_model_of_transformers_is_in_the_census_or_named_as_not_taken():
    types = {TYPE_OF.get(entry.name, entry.name) for entry in CENSUS}
    known = {kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING_NAMES}
    assert known - types == NOT_TAKEN.keys()


def test_a_configuration_that_leaves_a_size_at_that_of_the_published_model_is_none():
    entry = Configuration("wide", "dense", config=tiny("llama", intermediate_size=4096))
    with pytest.raises(
        AssertionError, match=r"wide is not tiny: model\.layers\.\d\.mlp\.\w+\.weight has a side of 4096"
    ):
        entry.model()
