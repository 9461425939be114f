"""The executor runs each step by its kind, and uses another run's result where the kind allows that."""

import pytest

from pipeline.engine.plan import Output, Step
from pipeline.errors import PipelineError
from pipeline.rundir.records import Result
from pipeline.runs.lifecycle import reopen
from pipeline.steps.base import StepKind
from pipeline.steps.executor import StepExecutor
from pipeline.steps.registry import STEP_KINDS
from stages.in_memory import NullCallbacks
from tests.pipeline.runs.golden_copy import copy_of_golden


class Counted(Result):
    count: int
    shared_with: str | None = None


class Counting(StepKind):
    """Counts how often it ran: the executor makes one instance for a run."""

    result, name, title, help = Counted, "count", "count", "Count the steps of this kind."

    def __init__(self):
        self.count = 0

    def run(self, context, step, attempt, callbacks):
        self.count += 1
        return Counted(count=self.count)

    def output_bytes(self, context, step, payload):
        return 10

    def scratch_bytes(self, context, step):
        return 7


class Warned(NullCallbacks):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def counting():
    STEP_KINDS.register("count", Counting)
    yield
    STEP_KINDS.unregister("count")


STEPS = (Step("count", subject="one", outputs=(Output("numbers"),)), Step("count", subject="two"))


def test_kind_of_another_package_runs_and_keeps_its_state_between_steps(tmp_path, counting):
    executor = StepExecutor(*reopen(copy_of_golden(tmp_path / "run", 2)), STEPS)
    found = [executor.execute(step, None, NullCallbacks()) for step in STEPS]
    assert [one.result for one in found] == [Counted(count=1), Counted(count=2)]
    assert all(one.peak_memory_bytes > 0 for one in found)
    assert executor.size_of("numbers") == 10
    assert executor.scratch_of(STEPS[0]) == 7


def test_step_that_takes_more_than_the_memory_limit_is_reported(tmp_path, counting):
    run, config = reopen(copy_of_golden(tmp_path / "run", 2))
    executor = StepExecutor(run, config.with_runtime({"memory_limit": "1MB"}), STEPS)
    callbacks = Warned()
    executor.execute(STEPS[0], None, callbacks)
    assert "more than --memory-limit 1MB" in callbacks.warnings[0]


def test_result_of_another_run_is_used_only_if_its_payloads_are_there(tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "run", 0))
    other, _ = reopen(copy_of_golden(tmp_path / "other"))
    step = STEP_KINDS.get("calibrate").step()
    executor = StepExecutor(run, config, (step,), shared_with=other)
    assert executor._shared_result(step, None) is None  # the records alone: no payload
    (other.path / other.payload("calibration").root).mkdir(parents=True)
    with pytest.raises(PipelineError):
        executor._shared_result(step, run.begin(step.name))
