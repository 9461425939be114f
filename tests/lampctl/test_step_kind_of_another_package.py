"""A step kind that nothing in lampctl knows: planned, run, shown in progress, status, comparison and report."""

import pytest

from pipeline.runs.lifecycle import reopen
from pipeline.steps.lamp_plan import steps_of
from pipeline.testing.steps import check_plan, check_reports, check_step_kind
from tests.pipeline.steps.stranger import KINDS, CountedZeros, CountZeros, known
from tests.small_models import save


@pytest.fixture
def package():
    """The package is installed."""
    with known():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_the_conformance_kit(kind):
    check_step_kind(kind.name, kind)
    check_reports(kind, CountedZeros(num_zeros=(3, 4)))


def test_it_is_planned_run_and_shown(lampctl, package, tmp_path, words):
    data = ("--calibration", "text:words.txt", "--num-samples", 4, "--seqlen", 64, "--evaluate", "text:words.txt")
    flags = ("--method", "wanda", "--sparsity", 0.5, "--eval-max-tokens", 256, "--device", "cpu", "--run-dir", "r")
    assert lampctl("init", save(tmp_path / "m", "llama"), *data, *flags).code == 0
    run, config = reopen(tmp_path / "r")
    plan = steps_of(run, config)
    check_plan(plan)
    assert [step.name for step in plan][-2:] == ["count-zeros", "measure-zeros"]

    assert "lampctl count-zeros r" in lampctl("count-zeros", "--help").out.replace("runs/mine", "r")
    refused = lampctl("count-zeros", "r")
    assert refused.code == 2
    assert "lampctl calibrate" in refused.err
    done = lampctl("resume", "r")
    assert done.code == 0, done.err
    (line,) = (line for line in done.err.splitlines() if "] count-zeros: " in line)
    num_zeros = int(line.split("count-zeros: ")[1].split(" zeros")[0])
    assert num_zeros > 0

    state = lampctl("status", "r", "--json").json
    steps = {step["name"]: step for step in state["steps"]}
    assert steps["count-zeros"]["headline"].startswith(f"{num_zeros} zeros in")
    measured = {found["metric"]: found for found in state["evaluations"]}
    assert measured["zeros"]["zeros"] == num_zeros
    shown = lampctl("status", "r").out
    assert f"{num_zeros} zeros in" in shown
    assert "weights" in shown
    assert "zeros/weights" in lampctl("compare", "r", "--json").out
    assert "zeros on weights" in (tmp_path / "r/model/README.md").read_text()

    assert lampctl("report", "r", "--out", "page", "--no-text").code == 0
    page = (tmp_path / "page/index.html").read_text()
    assert "Zeros by file" in page
    assert f"{num_zeros} zeros in" in page
    assert any("count-zeros" in path.read_text() for path in (tmp_path / "page").rglob("*.csv"))


def test_its_run_is_readable_without_the_package(lampctl, tmp_path, words):
    flags = ("--method", "magnitude", "--sparsity", 0.5, "--evaluate", "", "--device", "cpu", "--run-dir", "r")
    with known():
        done = lampctl("run", save(tmp_path / "m", "llama"), *flags)
    assert done.code == 0, done.err
    assert "] count-zeros: " in done.err
    shown = lampctl("status", "r")
    assert shown.code == 0, shown.err
    assert "finished" in shown.out
    assert "zeros" not in shown.out


def test_the_kit_refuses_reports_of_a_wrong_form():
    class Lines(CountZeros):
        @classmethod
        def headline(cls, result):
            return "two\nlines"

    with pytest.raises(AssertionError, match="more than one line"):
        check_reports(Lines, CountedZeros(num_zeros=(3,)))

    class Foreign(CountZeros):
        @classmethod
        def measurement(cls, result):
            return result

    with pytest.raises(AssertionError, match="measurement gives no EvaluateResult"):
        check_reports(Foreign, CountedZeros(num_zeros=(3,)))
