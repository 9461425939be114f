"""A run in a bucket, every request of which goes wrong once, in every way: nothing lost, nothing doubled.

    pytest -n0 -s -m 'slow or not slow' tests/faults/test_bucket.py

runs every request against every fault; the default run takes a sample of both.
"""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import FileExists, Superseded
from pipeline.rundir.records import Result
from pipeline.rundir.run_directory import RunDirectory, StepReport
from pipeline.rundir.storage.bucket import BucketStorage
from pipeline.rundir.storage.object_client import Objects
from tests.buckets import FAULTS, s3
from tests.pipeline.rundir.test_run_directory import manifest

STEPS = ("calibrate", "capture", "prune-block/0")


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, s3(patch) as proxy:
        yield proxy


def storage(address: str, folder: Path) -> BucketStorage:
    from obstore.store import from_url

    backoff = {"init_backoff": _ms(5), "max_backoff": _ms(20), "base": 2}
    retries = {"max_retries": 6, "retry_timeout": _ms(20_000), "backoff": backoff}
    return BucketStorage(Objects(address, from_url(address, retry_config=retries)), folder)


def _ms(number: int):
    from datetime import timedelta

    return timedelta(milliseconds=number)


def do_run(address: str, folder: Path) -> RunDirectory:
    """A run of three steps, its export shown as a view; then read again by a machine with an empty disk."""
    run = RunDirectory.create(storage(address, folder), manifest())
    for step in STEPS:
        attempt = run.begin(step)
        payload = attempt.folder(step.replace("/", "-"))
        for number in range(3):
            payload.write(f"{number}.safetensors", f"{step} {number} ".encode() * 500)
        payload.write("config.json", b"{}")
        run.commit(attempt, StepReport(Result(), {}, datetime(2026, 1, 1, tzinfo=UTC), 1.0))
        run.event("step-committed", step=step)
    run.release(["calibrate"])
    run.publish("capture")
    shutil.rmtree(folder)
    return RunDirectory.open(storage(address, folder))


def contents(run: RunDirectory) -> dict[str, bytes]:
    keys = [file.path for step in STEPS[1:] for file in run.payload(step.replace("/", "-")).files]
    view = run.storage.sizes("model")
    return {
        **{key.partition("/")[2].partition("/")[2]: run.storage.load(key) for key in keys},
        **{key: run.storage.read(key) for key in view},
    }


def require_sound(run: RunDirectory, quiet: dict[str, bytes]) -> None:
    assert [commit.step for commit in run.commits] == list(STEPS)
    assert contents(run) == quiet
    assert run.is_released("calibrate")
    attempts = {commit.attempt for commit in run.log}
    assert set(run.storage.names("data")) == attempts - {run.log[0].attempt}
    assert run.storage.names("commits") == [f"{i:06d}.json" for i in range(len(STEPS))]


@pytest.fixture(scope="module")
def quiet(server, tmp_path_factory):
    server.spoil(-1, "")
    run = do_run("s3://bucket/quiet", tmp_path_factory.mktemp("quiet") / "work")
    num_requests = server.num_requests
    return contents(run), num_requests


def spoil_each(server, quiet, tmp_path, numbers, faults):
    expected, num_requests = quiet
    count = 0
    for at in numbers(num_requests):
        for kind in faults:
            server.spoil(at, kind)
            run = do_run(f"s3://bucket/{kind.replace(' ', '-')}-{at}", tmp_path / "work")
            assert server.num_requests > at
            server.spoil(-1, "")
            require_sound(run, expected)
            shutil.rmtree(tmp_path / "work", ignore_errors=True)
            count += 1
    if count > 1:
        print(f"{count} runs with one of {num_requests} requests spoilt: no commit lost, none doubled, all bytes right")
    return count


def test_sample_of_failing_requests_loses_no_commit(server, quiet, tmp_path):
    turn = iter(FAULTS * 100)
    count = sum(
        spoil_each(server, quiet, tmp_path, lambda n, at=at: [at], [next(turn)]) for at in range(0, quiet[1], 6)
    )
    assert count >= 7


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_failing_request_loses_no_commit(server, quiet, tmp_path):
    assert spoil_each(server, quiet, tmp_path, range, FAULTS) == quiet[1] * len(FAULTS)


@pytest.mark.parametrize("kind", FAULTS)
def test_lost_answer_to_a_commit_is_recognized_as_ours(server, tmp_path, kind):
    objects = storage(f"s3://bucket/commit-{kind.replace(' ', '-')}", tmp_path / "work").objects
    server.spoil(0, kind)
    objects.create("commits/000000.json", b"mine")
    server.spoil(0, kind)
    with pytest.raises(FileExists):
        objects.create("commits/000000.json", b"another's")
    server.spoil(-1, "")
    assert objects.read("commits/000000.json") == b"mine"


def test_two_runners_in_a_bucket_make_one_chain(server, tmp_path):
    server.spoil(-1, "")
    address = "s3://bucket/two"
    one = RunDirectory.create(storage(address, tmp_path / "one"), manifest())
    two = RunDirectory.open(storage(address, tmp_path / "two"))
    attempts = [(run, run.begin("calibrate")) for run in (one, two)]
    results = []
    for run, attempt in attempts:
        attempt.folder("calibration").write("x", attempt.id.encode())
        try:
            run.commit(attempt, StepReport(Result(), {}, datetime.now(UTC), 0.0))
            results.append("won")
        except Superseded:
            results.append("lost")
    assert results == ["won", "lost"]
    third = RunDirectory.open(storage(address, tmp_path / "three"))
    assert [commit.attempt for commit in third.commits] == [attempts[0][1].id]


def test_missing_bucket_and_missing_permission_are_named(server, tmp_path, monkeypatch):
    from pipeline.errors import BucketError

    server.spoil(-1, "")
    with pytest.raises(BucketError, match="no such bucket"):
        RunDirectory.create(storage("s3://nowhere/run", tmp_path / "work"), manifest())
