"""A time limit that is over before a process has done anything: every process gets a little further all the same."""

import pytest

from pipeline.engine.preemption import RunTimer
from pipeline.engine.stop import StopRequest
from pipeline.errors import Preempted
from pipeline.rundir.run_directory import RunDirectory
from tests.faults.small_run import STEPS, go, require_clean, result

MOST = 3 * len(STEPS)  # processes; each does at least one of the two batches of a step, or the rest of it


def how_far(place) -> tuple[int, int]:
    """Commits, and checkpoints of the step after them."""
    run = RunDirectory.open(place)
    return len(run.log), len(run.storage.names(run.progress_folder))


@pytest.mark.parametrize("checkpoint_every_s", [1e-9, 0], ids=["often", "only when stopped"])
def test_every_process_advances_and_the_weights_are_the_same(tmp_path, checkpoint_every_s):
    go(tmp_path / "quiet")
    place, reached = tmp_path / "run", (0, 0)
    for _ in range(MOST):
        with StopRequest(end_process=pytest.fail, grace_s=60) as stop:
            stop.request_once_advanced(Preempted("the time is over"))
            try:
                go(place, stop, checkpoint_every_s)
                break
            except Preempted:
                assert how_far(place) > reached
                reached = how_far(place)
    require_clean(place, result(tmp_path / "quiet"))


def test_a_process_that_has_advanced_is_stopped_at_once(tmp_path):
    with StopRequest(end_process=pytest.fail, grace_s=60) as stop:
        stop.advanced()
        assert not stop.is_requested
        stop.request_once_advanced(Preempted("the time is over"))
        assert stop.is_requested
        with pytest.raises(Preempted):
            go(tmp_path / "run", stop)
    assert how_far(tmp_path / "run") == (0, 0)


def test_the_timer_asks_for_a_stop_that_waits():
    with StopRequest(end_process=pytest.fail, grace_s=60) as stop:
        timer = RunTimer("0.01s", 0.01, stop.request_once_advanced)
        timer._timer.join()
        assert stop.awaits_advance
        stop.check()
        stop.advanced()
        with pytest.raises(Preempted, match=r"allowed run time of 0\.01s"):
            stop.check()
