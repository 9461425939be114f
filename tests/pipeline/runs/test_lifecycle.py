"""Open runs, find the one to resume, and notice another machine."""

import pytest

from pipeline.engine.stop import StopRequest
from pipeline.errors import ConfigError, ConfigMismatch, DamagedData, RunNotFound, StepOrderError
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs import environment
from pipeline.runs.environment import settle_environment
from pipeline.runs.evaluations import change_evaluation, require_exported
from pipeline.runs.lifecycle import is_finished, newest_unfinished, reopen, resume
from pipeline.runs.model_card import card_facts
from pipeline.runs.status import status
from pipeline.steps.run_facts import EnvironmentRecord, environment_of
from stages.errors import UsageError
from tests.faults.small_run import Silent
from tests.pipeline.runs.golden_copy import change_newest, copy_of_golden


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
    with pytest.raises(
        StepOrderError, match=r"^lampctl evaluate \S+: this step comes later; call lampctl export \S+ first"
    ):
        require_exported(*reopen(copy_of_golden(tmp_path / "run", 19)))
    require_exported(*reopen(copy_of_golden(tmp_path / "whole", 20)))


def test_a_model_that_no_export_step_committed_is_damaged(tmp_path):
    place = copy_of_golden(tmp_path / "run", 20)
    change_newest(place, step="another-step")
    with pytest.raises(DamagedData, match="its exported model is not the result of a step that exports"):
        card_facts(*reopen(place))


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


def test_settings_that_no_step_records_are_remembered_by_a_finished_run(tmp_path, monkeypatch):
    """Golden runs have no payloads: a model that is not there would be published again first."""
    place = copy_of_golden(tmp_path / "run")
    monkeypatch.setattr(RunDirectory, "is_published", lambda run, name: True)
    run, config = reopen(place)
    before = [commit.step for commit in run.commits]
    assert config.evaluate
    resume(run, config.with_runtime({"evaluate": []}), Silent(), StopRequest(end_process=pytest.fail))
    again, remembered = reopen(place)
    assert remembered.evaluate == ()
    assert [commit.step for commit in again.commits] == before  # a record, not a step
    assert len(again.log) == len(before) + 1
    assert status(again, remembered).is_finished
    resume(again, remembered, Silent(), StopRequest(end_process=pytest.fail))
    assert len(reopen(place)[0].log) == len(before) + 1


def test_a_metric_or_source_whose_package_is_gone_is_refused_with_the_remedy(tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "run"))
    gone = config.with_runtime({"metrics": ["token-accuracy"]})
    with pytest.raises(UsageError, match=r"token-accuracy.* install the package .* lampctl evaluate .* --metrics ''"):
        change_evaluation(run, gone, {"evaluate": ""})
    assert change_evaluation(run, gone, {"evaluate": "", "metrics": ""}).metrics == ()
    with pytest.raises((ConfigError, UsageError), match=r"token-accuracy") as refused:
        change_evaluation(run, config, {"metrics": "token-accuracy"})
    assert "recorded" not in str(refused.value)
    elsewhere = config.changed(evaluate=("my-data:x",))
    with pytest.raises(UsageError, match=r"my-data.* install the package .* --evaluate ''"):
        change_evaluation(run, elsewhere, {})
