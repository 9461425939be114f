"""The state of a run from its records alone."""

import pytest

from pipeline.errors import DamagedData
from pipeline.runs.lifecycle import reopen
from pipeline.runs.model_card import card_facts
from pipeline.runs.status import status
from tests.pipeline.runs.golden_copy import change_newest, copy_of_golden


@pytest.mark.parametrize("schema", [1, 2])
def test_finished_run_of_every_schema(tmp_path, schema):
    run, config = reopen(copy_of_golden(tmp_path / "run", schema=schema))
    state = status(run, config)
    assert state.is_finished
    assert (state.next_step, state.num_done, state.remaining_s) == (None, 22, 0)
    assert {block.state for block in state.blocks} == {"refined"}
    assert state.num_masked == sum(block.num_masked for block in state.blocks) == 707_789
    assert state.sparsity == pytest.approx(0.6, abs=1e-5)
    assert [(found.which, found.metric, found.amount) for found in state.evaluations] == [
        ("pruned", "perplexity", 64),
        ("dense", "perplexity", 64),
    ]
    compensation, refinement = state.blocks[1].trainings
    assert (compensation.name, refinement.name) == ("compensation", "refinement")
    assert compensation.before.trained is not None
    assert compensation.before.held_out is not None
    assert len(compensation.epochs) == config.epochs == 1
    assert all(layer.num_found == layer.num_masked for block in state.blocks for layer in block.layers)


@pytest.mark.parametrize("schema", [1, 2])
def test_card_says_what_was_measured_and_how(tmp_path, schema):
    facts = card_facts(*reopen(copy_of_golden(tmp_path / "run", schema=schema)))
    (figure,) = facts.figures
    assert figure.dense is not None
    assert figure.pruned is not None
    assert figure.dense < figure.pruned
    assert facts.num_masked == 707_789


def test_unfinished_run_names_its_next_step_and_estimates_the_rest(tmp_path):
    state = status(*reopen(copy_of_golden(tmp_path / "run", 7)))
    assert not state.is_finished
    assert state.next_step == "compensate-block/2"
    assert [block.state for block in state.blocks] == ["refined", "refined", *["waiting"] * 4]
    assert state.remaining_s is not None
    assert state.remaining_s > 0
    assert state.num_masked is None


def test_the_estimate_ends_before_a_distillation_whose_time_is_not_known(tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "run", 7))
    assert status(run, config).remaining_until is None
    config = config.changed(distill=True, distill_epochs=1, distill_lr=1e-3, distill_batch=4)
    state = status(run, config)
    assert "distill" in [step.name for step in state.steps]
    assert state.remaining_until == "distill"
    assert state.remaining_s is not None
    assert 0 < state.remaining_s <= status(*reopen(copy_of_golden(tmp_path / "other", 7))).remaining_s


def test_nothing_is_estimated_before_a_step_of_each_block_kind_is_done(tmp_path):
    assert status(*reopen(copy_of_golden(tmp_path / "run", 3))).remaining_s is None


def test_overflowed_loss_is_shown_as_missing(tmp_path):
    place = copy_of_golden(tmp_path / "run", 5)
    loss = {"trained": None, "held_out": None}
    training = {"before": loss, "after": loss, "epoch_losses": [loss], "kept_epoch": 1, "num_steps": 2}
    change_newest(place, result={"training": training})
    assert status(*reopen(place)).blocks[1].trainings[0].after.trained is None


def test_result_of_another_form_is_damage_and_names_the_commit(tmp_path):
    place = copy_of_golden(tmp_path / "run", 5)
    change_newest(place, result={"training": {"before": "much"}})
    with pytest.raises(DamagedData, match=r"commits/000004\.json is damaged: .*compensate-block/1"):
        status(*reopen(place))


def test_bug_of_ours_is_not_taken_for_damage(tmp_path, monkeypatch):
    run, config = reopen(copy_of_golden(tmp_path / "run"))
    monkeypatch.setattr("pipeline.runs.status.stored_budget", lambda run: {}["no such key"])
    with pytest.raises(KeyError):
        status(run, config)
