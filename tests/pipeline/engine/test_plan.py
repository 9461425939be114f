"""The chain of steps as data."""

import pytest

from pipeline.engine.plan import Step, next_steps, releasable
from pipeline.errors import StepOrderError
from pipeline.steps.evaluate import evaluation_steps
from pipeline.steps.lamp_plan import chain
from pipeline.steps.order import require_next
from stages.metrics.base import EvaluationProtocol


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("method", "refines"),
    [("lamp", False), ("lamp", True), ("sparsegpt", False), ("wanda", False), ("magnitude", False)],
)
def test_every_step_reads_only_what_an_earlier_one_wrote(method, refines, num_blocks):
    steps = chain(num_blocks, compensates=method == "lamp", reads_data=method != "magnitude", refines=refines)
    written = set()
    for step in steps:
        assert set(step.reads) <= written, step.name
        assert not set(step.writes) & written
        written |= set(step.writes)
    assert [s.block for s in steps if s.kind == "prune-block"] == list(range(num_blocks))
    compensated = [s.block for s in steps if s.kind == "compensate-block"]
    assert compensated == (list(range(1, num_blocks)) if method == "lamp" else [])
    assert [s.block for s in steps if s.kind == "refine-block"] == (list(range(num_blocks)) if refines else [])
    assert any(s.kind == "calibrate" for s in steps) == (method != "magnitude")
    for block in range(num_blocks):
        assert sum(f"pruned/{block}" in step.writes for step in steps) == 1
        assert sum(f"masks/{block}" in step.writes for step in steps) == 1


def test_the_chain_of_the_paper():
    names = [step.name for step in chain(3, compensates=True)]
    assert names == [
        *("calibrate", "capture", "prune-block/0", "compensate-block/1", "prune-block/1"),
        *("compensate-block/2", "prune-block/2", "export"),
    ]


def test_the_chain_with_refinement():
    names = [step.name for step in chain(2, compensates=True, refines=True)]
    assert names == [
        *("calibrate", "capture", "prune-block/0", "refine-block/0"),
        *("compensate-block/1", "prune-block/1", "refine-block/1", "export"),
    ]


def test_a_budget_from_the_data_comes_before_the_first_block_is_pruned():
    names = [step.name for step in chain(2, compensates=False, allocates=True)]
    assert names == ["calibrate", "capture", "allocate", "prune-block/0", "prune-block/1", "export"]


@pytest.mark.parametrize("refines", [False, True])
def test_a_payload_lives_until_the_step_after_its_last_reader(refines):
    steps = chain(4, compensates=True, refines=refines)
    names = [step.name for step in steps]
    for num_done in range(len(names) + 1):
        gone = set(releasable(steps, names[:num_done]))
        # Losing the newest commit must be survivable: its step still finds what it reads, and so do all to come.
        needed = {payload for step in steps[max(0, num_done - 1) :] for payload in step.reads}
        assert not gone & needed
        assert not {p for p in gone if p.startswith(("pruned/", "masks/")) or p in ("calibration", "model")}
    at_the_end = set(releasable(steps, names))
    assert {"biased/0", "biased/1", "biased/2", "dense/1", "dense/2", "dense/3", "compensated/1"} <= at_the_end


@pytest.mark.parametrize("refines", [False, True])
def test_what_lies_on_disk_does_not_grow_with_the_number_of_blocks(refines):
    for num_blocks in (5, 50):
        steps = chain(num_blocks, compensates=True, refines=refines)
        names = [step.name for step in steps]
        alive = []
        for num_done in range(len(names) + 1):
            made = {p for step in steps[:num_done] for p in step.writes}
            bulky = {p for p in made - set(releasable(steps, names[:num_done])) if p.startswith(("biased", "dense"))}
            alive.append(len(bulky))
        assert max(alive) <= 4


def test_evaluations_of_the_pruned_model_come_first_and_none_twice():
    steps = evaluation_steps(["a", "b", "a"], EvaluationProtocol(128), with_dense=True)
    assert [s.name for s in steps] == [
        *("evaluate/pruned/a@128", "evaluate/dense/a@128", "evaluate/pruned/b@128", "evaluate/dense/b@128")
    ]
    few = EvaluationProtocol(128, 1000)
    assert evaluation_steps(["a"], few, with_dense=False)[0].name == "evaluate/pruned/a@128:1000"
    points = EvaluationProtocol(4096, None, "interior", 80)
    assert evaluation_steps(["a"], points, with_dense=False)[0].name == "evaluate/pruned/a@interior:80"


class Run:
    label = "r"

    def __init__(self, *done):
        self.commits = [Step(name) for name in done]
        for commit in self.commits:
            object.__setattr__(commit, "step", commit.kind)


def test_out_of_order_names_the_command_to_call_first():
    steps = chain(2, compensates=True)
    run = Run("calibrate", "capture")
    require_next(run, steps, Step("prune-block", 0))
    with pytest.raises(
        StepOrderError,
        match=r"^lampctl compensate-block r --block 1: .* later; call lampctl prune-block r --block 0 first",
    ):
        require_next(run, steps, Step("compensate-block", 1))
    with pytest.raises(
        StepOrderError, match=r"^lampctl capture r: .* already done; next is lampctl prune-block r --block 0"
    ):
        require_next(run, steps, Step("capture"))
    with pytest.raises(
        StepOrderError,
        match=r"^lampctl compensate-block r --block 0: the run has no such step; its steps are calibrate, ",
    ):
        require_next(run, steps, Step("compensate-block", 0))
    assert next(s.name for s in next_steps(steps, ["calibrate", "capture"])) == "prune-block/0"
