"""Many runners on one run, frozen ones, clocks that jump: one valid chain, the same digests.

pytest -n0 -s -m 'slow or not slow' tests/faults/test_runners.py
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import FileExists, Superseded
from pipeline.rundir.run_directory import RunDirectory
from tests.faults.disks import Unflushed, using
from tests.faults.small_run import STEPS, go, require_clean, result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("quiet") / "run"
    go(place)
    return result(place)


@pytest.mark.parametrize(
    "num_times", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3000)], id="all")]
)
def test_eight_concurrent_runners_make_one_chain(quiet, tmp_path, num_times):
    outcomes: dict[str, int] = {}
    for turn in range(num_times):
        place, ends = tmp_path / str(turn), []
        start = threading.Barrier(8)

        def runner(place=place, ends=ends, start=start):
            start.wait()
            try:
                go(place)
                ends.append("finished")
            except (Superseded, FileExists) as error:
                ends.append(type(error).__name__)
            except BaseException as error:  # shown by the assertion below
                ends.append(repr(error))

        threads = [threading.Thread(target=runner) for _ in range(8)]
        with using(Unflushed()):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(ends) == 8
            assert set(ends) <= {"finished", "Superseded", "FileExists"}, ends
            go(place)
        require_clean(place, quiet)
        run = RunDirectory.open(place)
        assert [commit.number for commit in run.log] == list(range(len(STEPS)))
        for end in ends:
            outcomes[end] = outcomes.get(end, 0) + 1
        shutil.rmtree(place)
    print(f"{num_times} times 8 runners: one commit per number; they ended {outcomes}")
    assert outcomes.get("Superseded", 0) > 0


RUNNER = """
import os, sys, time
from pathlib import Path
from pipeline.engine.stop import StopRequest
from pipeline.errors import Superseded
from pipeline.rundir.lease import Lease, Timing
from pipeline.engine.repair import repair
from tests.faults import small_run
from tests.faults.small_run import StandIn, go, open_or_create

place, pause = Path(sys.argv[1]), float(sys.argv[2])
execute = StandIn.execute

def slowly(self, step, attempt, callbacks):
    time.sleep(pause)
    callbacks.check_stop()
    return execute(self, step, attempt, callbacks)

StandIn.execute = slowly
run = open_or_create(place)
stop = StopRequest(lambda error: os._exit(99))
stop.grace_s = 60
try:
    with Lease(run, stop.request, lambda said: print(said, flush=True), timing=Timing(beat_s=0.1, stale_s=1.0)):
        print("began", flush=True)
        go(place, stop)
except Superseded as error:
    print(error, flush=True)
    sys.exit(6)
"""


def start(place: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", RUNNER, str(place), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_frozen_runner_is_superseded_and_stops_when_it_wakes(quiet, tmp_path):
    place = tmp_path / "run"
    frozen = start(place, 0.5)
    assert frozen.stdout is not None
    assert frozen.stdout.readline() == "began\n"
    while not list((place / "commits").glob("*.json")) if (place / "commits").exists() else True:
        time.sleep(0.02)
    frozen.send_signal(signal.SIGSTOP)
    # The same machine, but as another one would see it: its process cannot be looked at.
    lease = (place / "lease.json").read_text()
    (place / "lease.json").write_text(lease.replace('"host": "', '"host": "not '))
    second = start(place, 0.0)
    said, complained = second.communicate(timeout=60)
    assert second.returncode == 0, complained
    assert "may be worked on by process" in said
    assert "no sign of life" in said
    frozen.send_signal(signal.SIGCONT)
    _, complained = frozen.communicate(timeout=60)
    assert frozen.returncode == 6, complained
    require_clean(place, quiet)


@pytest.mark.parametrize("days", [-1, 1])
def test_lease_ignores_a_clock_that_jumps_by_a_day(quiet, tmp_path, monkeypatch, days):
    """Also in the middle of a run, and in the lease."""
    from pipeline.engine import repair, runner
    from pipeline.rundir import lease, run_directory

    class Jumping(datetime):
        num_calls = 0

        @classmethod
        def now(cls, tz=None):
            cls.num_calls += 1
            return datetime.now(UTC) + timedelta(days=days if cls.num_calls > 5 else 0)

    for module in (runner, lease, repair, run_directory):
        monkeypatch.setattr(module, "datetime", Jumping)
    place = tmp_path / "run"
    with lease.Lease(
        run := RunDirectory.create(place, __import__("tests.faults.small_run", fromlist=["manifest"]).manifest()),
        lambda error: pytest.fail(str(error)),
        lambda said: pytest.fail(said),
        timing=lease.Timing(0.01, 0.2),
    ):
        go(run.path)
        time.sleep(0.1)
    assert Jumping.num_calls > 20
    require_clean(place, quiet)
