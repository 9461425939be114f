"""Open runs, find the one to resume, and notice another machine."""

import pytest

from pipeline.errors import ConfigMismatch, RunNotFound, StepOrderError
from pipeline.runs import environment
from pipeline.runs.environment import settle_environment
from pipeline.runs.evaluations import require_exported
from pipeline.runs.lifecycle import is_finished, newest_unfinished, reopen
from pipeline.steps.run_facts import EnvironmentRecord, environment_of
from tests.faults.small_run import Silent
from tests.pipeline.runs.golden_copy import copy_of_golden


def test_run_is_finished_when_every_step_has_a_commit(tmp_path):
    assert is_finished(*reopen(copy_of_golden(tmp_path / "whole")))
    assert not is_finished(*reopen(copy_of_golden(tmp_path / "half", 21)))


def test_other_runtime_settings_make_a_finished_run_unfinished(tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "run"), runtime={"eval_max_tokens": 128})
    assert config.eval_max_tokens == 128
    assert not is_finished(run, config)


def test_newest_unfinished_run_is_found_among_others(tmp_path):
    with pytest.raises(RunNotFound):
        newest_unfinished(tmp_path)
    copy_of_golden(tmp_path / "whole")
    assert newest_unfinished(tmp_path) is None
    copy_of_golden(tmp_path / "half", 4)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert newest_unfinished(tmp_path) == tmp_path / "half"


def test_evaluation_before_the_export_names_the_step_to_do_first(tmp_path):
    with pytest.raises(StepOrderError, match="evaluate comes later: do export first"):
        require_exported(*reopen(copy_of_golden(tmp_path / "run", 19)))
    require_exported(*reopen(copy_of_golden(tmp_path / "whole", 20)))


def test_other_environment_is_refused_or_recorded(tmp_path, monkeypatch):
    run, config = reopen(copy_of_golden(tmp_path / "run", 4))
    then = environment_of(run)
    now = EnvironmentRecord.model_validate({**then.model_dump(), "packages": {**then.packages, "torch": "99.0"}})
    changes = ["torch is 99.0 here, it was another"]
    monkeypatch.setattr(environment, "environment_here", lambda run, config: (now, changes))
    listener = Silent()
    with pytest.raises(ConfigMismatch, match=r"torch is 99\.0"):
        settle_environment(run, config, listener)
    assert len(run.log) == 4
    settle_environment(run, config.with_runtime({"allow_environment_change": True}), listener)
    assert environment_of(run) == now
    assert len(run.commits) == 4
    assert "torch is 99.0" in listener.warnings[0]
    assert environment_of(reopen(run.path)[0]) == now
