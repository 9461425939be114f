"""SIGTERM, and SIGKILL after a checkpoint, inside the long steps: the work goes on from there to the same weights."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests import warm_python
from tests.faults.test_kill_in_every_stage import FLAGS, TINY_OPT
from tests.killed_runs import BOMB_AT_CHECKPOINT, exported_weights

# In the order in which block 1, and then the model, meet them.
KINDS = ("compensate-block", "prune-block", "refine-block", "distill", "evaluate")


def call(*arguments: str, bomb: tuple[str, int, int] | None = None, cwd: Path) -> subprocess.CompletedProcess:
    if bomb:
        return warm_python.run(BOMB_AT_CHECKPOINT, *map(str, bomb), *arguments, cwd=cwd)
    return warm_python.run(warm_python.LAMPCTL, *arguments, cwd=cwd)


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("quiet")
    answer = call("run", str(TINY_OPT), *FLAGS, "--run-dir", "run", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return exported_weights(folder / "run")


@pytest.mark.parametrize("kinds", [KINDS[1:4], pytest.param(KINDS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_sigterm_inside_a_step_resumes_from_its_checkpoint(quiet, tmp_path, kinds):
    """One run, stopped in each kind of step in turn; each time it resumes from its checkpoint."""
    begin = ("run", str(TINY_OPT), *FLAGS, "--run-dir", "run")
    for turn, kind in enumerate(kinds):
        arguments = begin if turn == 0 else ("resume", "run")
        answer = call(*arguments, bomb=(kind, signal.SIGTERM, 5), cwd=tmp_path)
        assert answer.returncode == 75, answer.stderr
        assert "stopped by SIGTERM" in answer.stderr
    answer = call("resume", "run", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert exported_weights(tmp_path / "run") == quiet
    restored = {event["step"].split("/")[0] for event in events(tmp_path / "run", "step-restored")}
    assert restored == set(kinds)
    assert not list((tmp_path / "run" / "progress").iterdir())


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:4])])
def test_sigkill_inside_a_step_resumes_from_its_last_checkpoint(quiet, tmp_path, kind):
    begin = ("run", str(TINY_OPT), *FLAGS, "--run-dir", "run", "--checkpoint-minutes", "1e-6")
    answer = call(*begin, bomb=(kind, signal.SIGKILL, 5), cwd=tmp_path)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    answer = call("resume", "run", "--checkpoint-minutes", "10", cwd=tmp_path)  # none is needed any more
    assert answer.returncode == 0, answer.stderr
    assert exported_weights(tmp_path / "run") == quiet
    (restored,) = events(tmp_path / "run", "step-restored")
    assert restored["step"] == ("distill" if kind == "distill" else f"{kind}/1")
