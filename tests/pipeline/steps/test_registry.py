"""Every step kind is complete, and every plan can be run and resumed."""

import pytest

from pipeline.errors import DamagedData
from pipeline.rundir.records import Result
from pipeline.steps.base import StepKind
from pipeline.steps.evaluate import evaluation_steps
from pipeline.steps.lamp_plan import chain
from pipeline.steps.registry import STEP_COMMANDS, STEP_KINDS
from pipeline.testing.steps import check_plan, check_step_kind
from stages.metrics.base import EvaluationProtocol


@pytest.mark.parametrize("name", STEP_KINDS.names)
def test_a_step_kind_is_complete(name):
    check_step_kind(name, STEP_KINDS.get(name))


def test_the_help_of_the_commands_is_that_of_their_kinds():
    """`lampctl --help` imports no kind, so the registry repeats it."""
    own = {name: kind.help for name, kind in STEP_KINDS.items() if kind.command == name}
    assert {**own, **STEP_COMMANDS} == own
    assert own.keys() - STEP_COMMANDS.keys() == {"export", "evaluate"}  # which have commands with flags of their own


class _Shared(Result):
    shared_with: str | None = None


def test_the_kit_refuses_an_incomplete_kind():
    class Nameless(StepKind):
        name, title, help, result = "nameless", "", "Does nothing.", Result

        def run(self, context, step, attempt, callbacks):
            return Result()

    with pytest.raises(AssertionError, match="empty title"):
        check_step_kind("nameless", Nameless)
    Nameless.title, Nameless.result = "do nothing", _Shared
    with pytest.raises(AssertionError, match="shared_with"):
        check_step_kind("nameless", Nameless)
    with pytest.raises(AssertionError, match="registered as other"):
        check_step_kind("other", Nameless)


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("allocates", [False, True])
@pytest.mark.parametrize(
    ("compensates", "reads_data", "refines"),
    [(True, True, True), (True, True, False), (False, True, False), (False, False, False)],
)
def test_every_plan_can_be_run_and_resumed(compensates, reads_data, refines, allocates, num_blocks):
    parts = {"compensates": compensates, "reads_data": reads_data, "refines": refines, "allocates": allocates}
    evaluations = evaluation_steps(["a", "b"], EvaluationProtocol(128), with_dense=True)
    check_plan((*chain(num_blocks, **parts), *evaluations))


def test_the_kit_refuses_a_plan_that_reads_what_nothing_writes():
    with pytest.raises(AssertionError, match="reads"):
        check_plan(chain(3, compensates=True)[1:])


@pytest.mark.parametrize("name", STEP_KINDS.names)
def test_a_result_of_another_form_is_damage(name):
    from tests.pipeline.rundir.test_records import step_commit

    commit = step_commit(step=name, result={"unheard_of": 1})
    with pytest.raises(DamagedData, match=r"commits/000000\.json is damaged: its result is not that of"):
        commit.result_as(STEP_KINDS.get(name).result)
