"""SIGKILL in the middle of every kind of step, then `lampctl resume`: the weights are those of a quiet run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import small_sam, warm_python
from tests.killed_runs import BOMB, exported_weights

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"
TEXT = ("--calibration", "pydocs", "--seqlen", "64", "--evaluate", "pydocs", "--eval-max-tokens", "512")
DISTILL = ("--distill-samples", "7", "--distill-batch", "2")
COMMON = (
    "--sparsity",
    "0.6",
    "--num-samples",
    "6",
    "--epochs",
    "2",
    "--refine-epochs",
    "2",
    *DISTILL,
    "--device",
    "cpu",
)
FLAGS = (*COMMON, *TEXT, "--distill-generated", "0")
GENERATES = (*COMMON, *TEXT, "--distill-generated", "5")
# Kinds of steps in the order of a run.
ALL = (
    "calibrate",
    "capture",
    "prune-block",
    "refine-block",
    "compensate-block",
    "teach",
    "generate",
    "distill",
    "export",
    "end-loss",
    "evaluate",
)
SOME = ("capture", "refine-block", "generate", "distill", "end-loss")


def lampctl(*arguments: str, bomb: str | None = None, cwd: Path) -> subprocess.CompletedProcess:
    if bomb:
        return warm_python.run(BOMB, bomb, *arguments, cwd=cwd)
    return warm_python.run(warm_python.LAMPCTL, *arguments, cwd=cwd)


def attempts_per_step(run: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "step-started":
            counts[event["step"]] = counts.get(event["step"], 0) + 1
    return counts


@pytest.fixture(scope="module", params=["language", "vision"])
def begin(request, tmp_path_factory):
    """The command that begins a run, for each task."""
    if request.param == "language":
        return ("run", str(TINY_OPT), *GENERATES)
    folder = tmp_path_factory.mktemp("vision")
    images = f"coco:{small_sam.coco(folder / 'images', 8)}"
    model = small_sam.save(folder / "sam")
    return ("run", str(model), *COMMON, "--calibration", images, "--evaluate", images)


@pytest.fixture(scope="module")
def quiet_run(begin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    finished = lampctl(*begin, "--run-dir", "run", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


@pytest.mark.parametrize("kinds", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_sigkill_once_in_each_kind_of_step_gives_the_same_exported_weights(begin, quiet_run, tmp_path, kinds):
    kinds = [kind for kind in kinds if kind != "generate" or "--distill-generated" in begin]  # text alone is written
    first = lampctl(*begin, "--run-dir", "runs/killed", bomb=kinds[0], cwd=tmp_path)
    assert first.returncode == -signal.SIGKILL, first.stderr
    for kind in kinds[1:]:
        killed = lampctl("resume", bomb=kind, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (kind, killed.stderr)
    last = lampctl("resume", cwd=tmp_path)
    assert last.returncode == 0, last.stderr

    run = tmp_path / "runs" / "killed"
    assert exported_weights(run) == exported_weights(quiet_run)
    quiet, killed_counts = attempts_per_step(quiet_run), attempts_per_step(run)
    redone = {step: n - quiet[step] for step, n in killed_counts.items() if n != quiet[step]}
    # One step of each kind was begun twice; nothing that was committed was done again.
    assert sorted(step.split("/")[0] for step in redone) == sorted(kinds)
    assert set(redone.values()) == {1}
    leftovers = {path.name.split("-")[0] for path in (run / "data").iterdir()}
    committed = {path.stem for path in (run / "commits").iterdir()}
    assert leftovers <= committed
    assert len(list((run / "data").iterdir())) == len({path.name for path in (quiet_run / "data").iterdir()})


# SIGTERM: tests/faults/test_stops_inside_steps.py
@pytest.mark.parametrize("begin", ["language"], indirect=True)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130)])
def test_sigint_stops_at_a_batch_boundary_and_the_run_resumes(number, code, begin, quiet_run, tmp_path):
    command = [sys.executable, "-m", "lampctl", *begin, "--run-dir", "run"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    events = tmp_path / "run" / "events.jsonl"
    while running.poll() is None and not (events.exists() and "prune-block/0" in events.read_text()):
        time.sleep(0.02)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == code, stderr
    assert "resume" in stderr
    finished = lampctl("resume", "run", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert exported_weights(tmp_path / "run") == exported_weights(quiet_run)
