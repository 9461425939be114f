"""Crashes at every instant of a whole run, by the real engine and store (`small_run.py`), and what comes after.

    pytest -n0 -s -m 'slow or not slow' tests/faults/test_crashes.py

takes every instant; the default run takes a fixed selection of them. A *kill* leaves what the process had written,
a *power cut* loses, keeps or garbles what was not flushed (`disks.py`).
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.errors import DiskError, OutOfDisk
from pipeline.rundir.run_directory import RunDirectory
from tests import warm_python
from tests.faults.disks import BROKEN, NO_SPACE, Counting, Crash, FailingAt, KilledAt, PowerCutAt, Unflushed, using
from tests.faults.small_run import STEPS, go, require_clean, result

slow = pytest.mark.slow
everything = [pytest.param(1, marks=[slow, pytest.mark.timeout(3000)], id="all")]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> tuple[dict, int]:
    """What an undisturbed run gives, and how many operations it takes."""
    place = tmp_path_factory.mktemp("quiet") / "run"
    calls = Counting()
    with using(calls):
        go(place)
    require_clean(place, result(place))
    return result(place), calls.num_done


def commits_in(place: Path) -> dict[str, bytes]:
    folder = place / "commits"
    return {p.name: p.read_bytes() for p in folder.glob("0*.json")} if folder.exists() else {}


def resume(place: Path, expected: dict) -> list[str]:
    """Finish the run after a crash; no committed step may be done again, no commit changed. Gives what was done."""
    before = commits_in(place)
    done = {json.loads(data)["step"] for data in before.values() if _is_json(data)}
    with using(Unflushed()):
        worker = go(place)
    again = [name for name in worker.executed if name in done]
    assert not again, f"committed, and done again: {again}"
    after = commits_in(place)
    assert all(after[name] == data for name, data in before.items() if _is_json(data))
    require_clean(place, expected)
    return worker.executed


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("step", [29, *everything])
def test_kill_at_each_operation_loses_at_most_one_step(quiet, tmp_path, step):
    expected, num_operations = quiet
    count = 0
    for at in range(0, num_operations, step):
        place = tmp_path / "run"
        with using(KilledAt(at)), pytest.raises(Crash):
            go(place)
        resume(place, expected)
        shutil.rmtree(place)
        count += 1
    print(f"{count} kills at {num_operations} operations: no committed step was done again, all digests are equal")
    assert count == len(range(0, num_operations, step))


@pytest.mark.parametrize("step", [29, *everything])
def test_power_cut_at_each_operation_loses_no_commit(quiet, tmp_path, step):
    expected, num_operations = quiet
    place, count = tmp_path / "run", 0
    for at in range(0, num_operations, step):
        cut(place, at, seed=at)
        resume(place, expected)
        shutil.rmtree(place)
        count += 1
    print(f"{count} power cuts at {num_operations} operations: no commit lost, all digests are equal")


def cut(place: Path, at: int, seed: int) -> bool:
    """Whether the power went before the run was done."""
    calls = PowerCutAt(place, at, seed)
    with using(calls):
        try:
            go(place)
        except Crash:
            committed = set(commits_in(place))
            calls.survivors()
            # Every commit that the program knew to be made is there; at most the one under way may be, too.
            lost = committed - set(commits_in(place))
            assert len(lost) <= 1
            assert not lost or max(committed) in lost
            return True
    return False


@pytest.mark.parametrize("num_seeds", [30, pytest.param(5000, marks=[slow, pytest.mark.timeout(6000)], id="all")])
def test_random_power_cuts_up_to_three_deep_lose_no_commit(quiet, tmp_path, num_seeds):
    """At random instants, again while recovering, up to three deep."""
    expected, num_operations = quiet
    place, num_cuts = tmp_path / "run", 0
    for seed in range(num_seeds):
        chance = random.Random(seed)
        for _depth in range(chance.randrange(1, 4)):
            num_cuts += cut(place, chance.randrange(num_operations), seed * 7 + num_cuts)
        resume(place, expected)
        shutil.rmtree(place)
    print(f"{num_seeds} seeds, {num_cuts} power cuts up to three deep: no wrong result")
    assert num_cuts >= num_seeds


@pytest.mark.parametrize("num_sequences", [12, pytest.param(500, marks=[slow, pytest.mark.timeout(3000)], id="all")])
def test_three_kills_during_recovery_give_the_same_run(quiet, tmp_path, num_sequences):
    expected, num_operations = quiet
    place = tmp_path / "run"
    for seed in range(num_sequences):
        chance = random.Random(seed)
        for _depth in range(3):
            with using(KilledAt(chance.randrange(num_operations // 2))):
                try:
                    go(place)
                except Crash:
                    continue
        resume(place, expected)
        shutil.rmtree(place)
    print(f"{num_sequences} sequences of three kills: all digests are equal")


@pytest.mark.parametrize("num_kills", [30, pytest.param(500, marks=[slow, pytest.mark.timeout(3000)], id="all")])
def test_each_of_many_kills_costs_one_step(quiet, tmp_path, num_kills):
    """Each costs the step under way, and no other."""
    expected, num_operations = quiet
    place, chance, num_done, num_runs = tmp_path / "run", random.Random(1), 0, 0
    while num_done < num_kills:
        before = set(commits_in(place))
        with using(KilledAt(chance.randrange(num_operations // 4))):
            try:
                worker = go(place)
                executed = worker.executed
            except Crash:
                num_done += 1
                continue
        assert len(executed) == len(set(executed)) <= len(STEPS) - len(before)
        require_clean(place, expected)
        shutil.rmtree(place)
        num_runs += 1
    if place.exists():
        resume(place, expected)
    print(f"{num_done} kills over {num_runs + 1} runs")


@pytest.mark.parametrize("step", [80, *[pytest.param(13, marks=[slow, pytest.mark.timeout(3000)], id="all")]])
def test_sigkill_of_a_process_gives_the_same_run(quiet, tmp_path, step):
    """In a process of its own, killed by the system."""
    expected, num_operations = quiet
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.faults.disks import Counting, using\n"
        "from tests.faults.small_run import go\n"
        "class Killed(Counting):\n"
        "    def strike(self, name):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "with using(Killed(int(sys.argv[2]))):\n"
        "    go(Path(sys.argv[1]))\n"
    )
    place, count = tmp_path / "run", 0
    for at in range(step // 2, num_operations, step * 3):
        ended = warm_python.run(code, str(place), str(at))
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        resume(place, expected)
        shutil.rmtree(place)
        count += 1
    print(f"{count} processes killed by the system")


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("step", [27, *everything])
def test_full_disk_at_each_write_is_resumable(quiet, tmp_path, step, lasts):
    fail_each(quiet[0], tmp_path, step, NO_SPACE, ("write", "create", "make_folder"), lasts, OutOfDisk)


@pytest.mark.parametrize("step", [27, *everything])
def test_io_error_at_each_flush_is_resumable(quiet, tmp_path, step):
    fail_each(quiet[0], tmp_path, step, BROKEN, ("flush",), True, DiskError)


def fail_each(expected, tmp_path, step, number, kinds, lasts, error):
    counting = FailingAt(-1, number, kinds, lasts)
    with using(counting):
        go(tmp_path / "count")
    count = num_failed = 0
    place = tmp_path / "run"
    for at in range(0, counting.num_done, step):
        before: dict[str, bytes] = {}
        with using(FailingAt(at, number, kinds, lasts)):
            try:
                go(place)
            except error:
                num_failed += 1
                before = commits_in(place)
        if place.exists() and before:
            for _ in range(3):  # again and again: failures must not fill the disk
                with using(FailingAt(0, number, kinds, True)), pytest.raises(DiskError):
                    go(place)
            assert len(list((place / "data").iterdir())) <= len(before) + 2
            RunDirectory.open(place)
        resume(place, expected)
        assert all(commits_in(place)[name] == data for name, data in before.items())
        shutil.rmtree(place)
        count += 1
    print(f"{count} of {counting.num_done} {'/'.join(kinds)} failed: {num_failed} ended the run, all went on after")
    assert num_failed > count / 2
