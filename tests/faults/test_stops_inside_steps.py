"""SIGTERM, and SIGKILL after a checkpoint, inside the long steps: the work goes on from there to the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_kill_in_every_stage import FLAGS, TINY_OPT, weights

KINDS = ("compensate-block", "prune-block", "refine-block", "evaluate")  # in the order in which block 1 meets them
# Sends itself a signal at a batch boundary of a step of this kind, once so many have passed.
BOMB = """
import os, signal, sys
from pipeline import engine

kind, number, wanted, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 0
checkpoint = engine._StepCallbacks.checkpoint

def explode(self, make):
    global count
    count += self._step.kind == kind and self._step.block in (None, 1)
    if count == wanted and number == signal.SIGTERM:
        os.kill(os.getpid(), number)
    checkpoint(self, make)
    if count == wanted:
        os.kill(os.getpid(), number)

engine._StepCallbacks.checkpoint = explode
sys.argv[:4] = ["lampctl"]
from lampctl.app import main
main()
"""


def call(*arguments: str, bomb: tuple[str, int, int] | None = None, cwd: Path) -> subprocess.CompletedProcess:
    start = ["-c", BOMB, *map(str, bomb)] if bomb else ["-m", "lampctl"]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=dict(os.environ), timeout=240)


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("quiet")
    answer = call("run", str(TINY_OPT), *FLAGS, "--run-dir", "run", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return weights(folder / "run")


def test_sigterm_inside_every_long_step(quiet, tmp_path):
    """One run, stopped in each kind of step in turn; each time it goes on from where it was."""
    begin = ("run", str(TINY_OPT), *FLAGS, "--run-dir", "run")
    for turn, kind in enumerate(KINDS):
        arguments = begin if turn == 0 else ("resume", "run")
        answer = call(*arguments, bomb=(kind, signal.SIGTERM, 5), cwd=tmp_path)
        assert answer.returncode == 75, answer.stderr
        assert "stopped by SIGTERM" in answer.stderr
    answer = call("resume", "run", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert weights(tmp_path / "run") == quiet
    restored = {event["step"].split("/")[0] for event in events(tmp_path / "run", "step-restored")}
    assert restored == set(KINDS)
    assert not list((tmp_path / "run" / "progress").iterdir())


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:3])])
def test_sigkill_after_a_checkpoint(quiet, tmp_path, kind):
    begin = ("run", str(TINY_OPT), *FLAGS, "--run-dir", "run", "--checkpoint-minutes", "1e-6")
    answer = call(*begin, bomb=(kind, signal.SIGKILL, 5), cwd=tmp_path)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    answer = call("resume", "run", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert weights(tmp_path / "run") == quiet
    (restored,) = events(tmp_path / "run", "step-restored")
    assert restored["step"] == f"{kind}/1"
