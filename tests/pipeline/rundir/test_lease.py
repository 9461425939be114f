"""Who works on a run: refused, taken over, lost, and harmless whatever lease.json says."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.errors import Occupied
from pipeline.rundir.lease import Lease, Timing, _this_process, holder_of
from pipeline.rundir.run_directory import RunDirectory
from tests.pipeline.rundir.test_run_directory import manifest

QUICK = Timing(beat_s=0.05, stale_s=0.4)


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", manifest())


def lease(run, said=None, lost=None, **options):
    said, lost = [] if said is None else said, [] if lost is None else lost
    return Lease(RunDirectory.open(run.path), lost.append, said.append, timing=QUICK, **options)


def write(run, **changes):
    host, boot, pid, process = _this_process()
    fields = {"token": "other", "host": host, "boot": boot, "pid": pid, "process": process, "beat": 0}
    record = {**fields, "since": "2026-11-25T12:00:00+00:00", **changes}
    (run.path / "lease.json").write_text(json.dumps(record))
    return record


def test_it_is_there_while_it_is_held_and_beats(run):
    with lease(run):
        first = holder_of(run)
        assert first.pid == os.getpid()
        time.sleep(0.3)
        assert holder_of(run).beat > first.beat
    assert not (run.path / "lease.json").exists()


def test_a_second_runner_on_this_machine_is_refused_at_once_with_what_to_do(run):
    with lease(run):
        start = time.monotonic()
        with pytest.raises(Occupied, match=rf"process {os.getpid()} on .*--takeover"):
            lease(run).__enter__()
        assert time.monotonic() - start < QUICK.stale_s
    with lease(run):
        pass


def test_a_dead_holder_on_this_machine_is_followed_at_once(run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(run, pid=dead.pid, process="1")
    start = time.monotonic()
    with lease(run):
        assert time.monotonic() - start < QUICK.stale_s


def test_another_process_with_the_holders_pid_is_not_the_holder(run):
    write(run, process="12345")
    with lease(run):
        assert holder_of(run).token != "other"


@pytest.mark.parametrize("since", ["2026-11-24T12:00:00+00:00", "2026-11-26T12:00:00+00:00", "long ago"])
def test_a_holder_elsewhere_that_gives_no_sign_is_followed_after_a_while_whatever_its_clock_says(run, since):
    write(run, host="elsewhere", since=since)
    said = []
    start = time.monotonic()
    with lease(run, said):
        assert time.monotonic() - start >= QUICK.stale_s
    assert "may be worked on by process" in said[0]
    assert "no sign of life" in said[1]


def test_a_holder_elsewhere_that_beats_is_not_followed(run):
    record = write(run, host="elsewhere")
    code = (
        "import json, sys, time\n"
        "for beat in range(1, 40):\n"
        "    time.sleep(0.05)\n"
        "    open(sys.argv[1], 'w').write(json.dumps({**json.loads(sys.argv[2]), 'beat': beat}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run.path / "lease.json", json.dumps(record)])
    try:
        with pytest.raises(Occupied, match="on elsewhere"):
            lease(run).__enter__()
    finally:
        process.kill()
        process.wait()


def test_who_insists_gets_it_and_the_other_hears_of_it(run):
    lost, said = [], []
    with lease(run, lost=lost):
        with lease(run, said, takeover=True):
            time.sleep(0.3)
            assert "has taken" in str(lost[0])
            assert "taking" in said[0]
            assert holder_of(run) is not None
        assert holder_of(run) is None
    assert len(lost) == 1


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"[]", b'{"token": 1}', b"\xff" * 100, b"[" * 100_000, b'{"token": "x", "pid": 1e999}']
)
def test_a_damaged_lease_is_nobodys(run, contents):
    (run.path / "lease.json").write_bytes(contents)
    with lease(run):
        assert holder_of(run).pid == os.getpid()


def test_pids_that_no_system_has_are_nobodys(run):
    write(run, pid=10**30)
    with lease(run):
        assert holder_of(run).pid == os.getpid()


def test_a_link_in_its_place_is_replaced_and_not_followed(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (run.path / "lease.json").symlink_to(tmp_path / "mine")
    with lease(run):
        assert holder_of(run).pid == os.getpid()
    assert (tmp_path / "mine").read_text() == "precious"
