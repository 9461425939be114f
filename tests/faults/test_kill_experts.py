"""SIGKILL in every kind of step of a run on a mixture of experts: the weights are those of a quiet run."""

import signal

import pytest

from tests import small_experts
from tests.faults.test_kill_in_every_stage import FLAGS, lampctl
from tests.killed_runs import exported_weights

pytestmark = pytest.mark.slow
KINDS = ("prune-block", "refine-block", "compensate-block", "prune-block", "export")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_run_on_experts_ends_with_the_same_bits_however_often_it_is_killed(tmp_path, family):
    model = small_experts.save(tmp_path / "m", family)
    begin = ("run", str(model), *FLAGS)
    quiet = lampctl(*begin, "--run-dir", "quiet", cwd=tmp_path)
    assert quiet.returncode == 0, quiet.stderr
    command = (*begin, "--run-dir", "killed")
    for kind in KINDS:
        killed = lampctl(*command, bomb=kind, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (kind, killed.stderr)
        command = ("resume", "killed")
    last = lampctl(*command, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert exported_weights(tmp_path / "killed") == exported_weights(tmp_path / "quiet")
