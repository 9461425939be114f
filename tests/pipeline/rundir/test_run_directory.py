"""The run directory: what is committed stays, whatever happens between any two operations on the disk."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import (
    ConfigMismatch,
    DamagedData,
    FileExists,
    MissingChunk,
    NotARun,
    OutOfDisk,
    RunNotFound,
    StepOrderError,
    Superseded,
)
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import Calls
from pipeline.rundir.records import Result, RunManifest, StepCommit
from pipeline.rundir.run_directory import RunDirectory, StepReport, find_runs
from pipeline.rundir.step_transaction import Attempt

STEPS = ["calibrate", "prune-block/0", "export", "evaluate"]


def manifest(**changes: Any) -> RunManifest:
    fields: dict[str, Any] = {
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "config": {"sparsity": 0.5},
        "provenance": {},
        "identity": {},
        "model": {},
        "environment": {},
        "budget": [],
        "plan": STEPS,
    }
    return RunManifest.new(**{**fields, **changes})


class Loss(Result):
    loss: float


def commit(run: RunDirectory, attempt: Attempt) -> StepCommit:
    return run.commit(attempt, StepReport(Loss(loss=0.5), {}, datetime.now(UTC), 0.1))


def do_step(run: RunDirectory, step: str) -> StepCommit:
    """A small run with one of everything: streams, a file, scratch, a folder of links."""
    attempt = run.begin(step)
    if step == "calibrate":
        tokens = attempt.stream("calibration", 2, (4,), torch.int64)
        for index in range(2):
            tokens.write(index, torch.arange(4) + index)
    elif step == "prune-block/0":
        targets = attempt.scratch().stream("targets", 1, (4,), torch.float32)
        biased = attempt.stream("biased/1", 2, (4,), torch.bfloat16)
        for index, sample in enumerate(run.open_stream("calibration")):
            targets.write(0, sample)
            biased.write(index, targets[0] * 2)
        attempt.write_file("pruned/0", "block-00000.safetensors", lambda file: file.write(b"weights" * 9))
    elif step == "export":
        shard = run.open_file("pruned/0")
        folder = attempt.folder("model")
        folder.link(shard.name, run.payload("pruned/0").files[0])
        folder.write("config.json", b'{"sum": %d}' % sum(int(x.sum()) for x in run.open_stream("biased/1")))
    return commit(run, attempt)


def go_on(path: Path, promised: list[str] | None = None) -> RunDirectory:
    """Do what is left of the small run; `promised` gets each step once its commit has returned."""
    run = RunDirectory.open(path) if (path / "run.json").exists() else RunDirectory.create(path, manifest())
    settle(run)
    for step in STEPS[len(run.commits) :]:
        do_step(run, step)
        if promised is not None:
            promised.append(step)
        settle(run)
    return run


def settle(run: RunDirectory) -> None:
    if run.commit_for("evaluate") is not None:
        run.release(["biased/1"])
    if run.commit_for("export") is not None:
        run.publish("model")
        run.write_view("model/README.md", b"a card")
    run.clean()


def digests(run: RunDirectory) -> dict[str, Any]:
    """What a run has made, without the names of attempts, and times."""
    return {
        f"{commit.step} {name}": {payload.inner(file): (file.size, file.sha256) for file in payload.files}
        for commit in run.commits
        for name, payload in commit.payloads.items()
    }


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", manifest())


# Replay


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = go_on(tmp_path / "deep" / "run")
    again = RunDirectory.open(run.path)
    assert again.manifest == run.manifest == manifest()
    assert again.commits == run.commits
    assert [commit.step for commit in again.commits] == STEPS
    assert again.commits[0].parent == run.manifest.digest
    assert again.commits[1].parent == again.commits[0].digest
    assert again.commit_for("prune-block/0") == again.commits[1]
    assert again.commit_for("prune-block/1") is None
    assert [sample.tolist() for sample in again.open_stream("calibration")] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert again.open_file("pruned/0").read_bytes() == b"weights" * 9
    assert again.open_file("model", "config.json").read_bytes() == b'{"sum": 32}'


def test_a_name_means_its_newest_payload(run: RunDirectory) -> None:
    for step in ("one", "two"):
        attempt = run.begin(step)
        attempt.write_file("state", "state.txt", step.encode())
        commit(run, attempt)
    assert run.open_file("state").read_bytes() == b"two"
    with pytest.raises(StepOrderError, match="nothing-yet"):
        run.payload("nothing-yet")


def test_a_lost_newest_commit_is_redone_with_the_same_result(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    before = digests(run)
    (run.path / "commits" / "000003.json").unlink()
    again = go_on(run.path)
    assert digests(again) == before
    assert len(again.commits) == 4


def test_run_json_is_written_once(run: RunDirectory) -> None:
    with pytest.raises(FileExists):
        RunDirectory.create(run.path, manifest(config={"sparsity": 0.9}))
    assert RunDirectory.open(run.path).manifest.config == {"sparsity": 0.5}


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotARun, match="--run-dir"):
        RunDirectory.create(tmp_path, manifest())
    with pytest.raises(NotARun):
        RunDirectory.open(tmp_path)
    with pytest.raises(NotARun):
        RunDirectory.open(tmp_path / "thesis.tex")
    with pytest.raises(NotARun):
        RunDirectory.create(tmp_path / "thesis.tex", manifest())
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_no_run_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunNotFound, match=r"run\.json"):
            RunDirectory.open(path)
    (tmp_path / "lost+found").mkdir()
    assert RunDirectory.create(tmp_path, manifest()).commits == ()


def test_runs_are_found_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        RunDirectory.create(tmp_path / name, manifest())
        os.utime(tmp_path / name / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "no-run").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "new", tmp_path / "middle", tmp_path / "old"]
    assert find_runs(tmp_path / "missing") == []


# Damage


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"elapsed_s": 0.1', b'"elapsed_s": 0.2'))


def take_from_another_run(path: Path) -> None:
    other = RunDirectory.create(path.parent.parent.parent / "other", manifest(config={"sparsity": 0.7}))
    for step in STEPS:
        do_step(other, step)
    shutil.copy(other.path / "commits" / path.name, path)


def repeat_the_first(path: Path) -> None:
    shutil.copy(path.parent / "000000.json", path)


@pytest.mark.parametrize(
    "damage", [tear, empty, edit, take_from_another_run, repeat_the_first], ids=lambda damage: damage.__name__
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_commit_is_named(tmp_path: Path, number: int, damage: Callable[[Path], None]) -> None:
    run = go_on(tmp_path / "run")
    damage(run.path / "commits" / f"00000{number}.json")
    with pytest.raises(DamagedData, match=rf"commits/00000{number}\.json"):
        RunDirectory.open(run.path)


def test_only_the_newest_damaged_commit_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.rundir.commit_log._STILL_WRITING_S", 0.0)
    run = go_on(tmp_path / "run")
    tear(run.path / "commits" / "000003.json")
    with pytest.raises(DamagedData, match="lampctl resume"):
        RunDirectory.open(run.path)
    assert len(RunDirectory.open(run.path, is_resuming=True).commits) == 3
    assert len(RunDirectory.open(run.path).commits) == 3
    tear(run.path / "commits" / "000001.json")
    with pytest.raises(DamagedData, match=r"commits/000001\.json.*cannot be rebuilt"):
        RunDirectory.open(run.path, is_resuming=True)
    assert (run.path / "commits" / "000001.json").exists()


def test_a_record_that_is_still_being_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without hard links another process may be in the middle of it."""
    run = go_on(tmp_path / "run")
    path = run.path / "commits" / "000003.json"
    whole = path.read_bytes()
    tear(path)
    monkeypatch.setattr("pipeline.rundir.commit_log.time.sleep", lambda seconds: path.write_bytes(whole))
    with pytest.raises(DamagedData):
        RunDirectory.open(run.path, is_resuming=True)
    assert len(RunDirectory.open(run.path).commits) == 4


def test_an_invalidation_takes_commits_out_of_force_for_good(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    run.invalidate(1, "as a test", {})
    for seen in (run, RunDirectory.open(run.path)):
        assert [c.step for c in seen.commits] == ["calibrate"]
        assert len(seen.log) == 5
    again = RunDirectory.open(run.path)
    for step in STEPS[1:]:
        do_step(again, step)
        settle(again)
    assert [c.number for c in RunDirectory.open(run.path).commits] == [0, 5, 6, 7]
    # What was taken out of force is gone from the disk, too.
    assert {path.name for path in (run.path / "data").iterdir()} == {c.attempt for c in again.commits}
    assert digests(again) == digests(go_on(tmp_path / "other"))


def test_an_invalidation_of_what_is_to_come_is_refused(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    with pytest.raises(ValueError, match="names an earlier commit"):
        run.invalidate(4, "as a test", {})


@pytest.mark.parametrize("number", [0, 1])
def test_a_gap_is_damage(tmp_path: Path, number: int) -> None:
    run = go_on(tmp_path / "run")
    (run.path / "commits" / f"00000{number}.json").unlink()
    with pytest.raises(DamagedData, match=rf"00000{number}\.json is missing"):
        RunDirectory.open(run.path)


def test_what_is_no_commit_is_not_taken_for_one(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    shutil.copy(run.path / "commits" / "000003.json", run.path / "commits" / "4.json")
    with pytest.raises(DamagedData, match=r"commits/4\.json"):
        RunDirectory.open(run.path)


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"[" * 100_000, b'{"schema_version": 1}'])
def test_a_hostile_run_json_is_damage(run: RunDirectory, data: bytes) -> None:
    (run.path / "run.json").write_bytes(data)
    with pytest.raises(DamagedData, match=r"run\.json"):
        RunDirectory.open(run.path)
    with pytest.raises(FileExists):
        RunDirectory.create(run.path, manifest())
    assert (run.path / "run.json").read_bytes() == data


def test_a_run_of_a_newer_version_is_left_untouched(run: RunDirectory) -> None:
    newer = json.dumps({**json.loads((run.path / "run.json").read_bytes()), "schema_version": 3})
    (run.path / "run.json").write_text(newer)
    with pytest.raises(ConfigMismatch, match="newer"):
        RunDirectory.open(run.path)
    assert (run.path / "run.json").read_text() == newer


def test_a_damaged_file_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    path = run.path / run.payload("pruned/0").files[0].path
    path.write_bytes(path.read_bytes().replace(b"w", b"W", 1))
    for again in (RunDirectory.open(run.path), RunDirectory.open(run.path)):
        with pytest.raises(DamagedData, match=r"block-00000.*pruned/0 of prune-block/0"):
            again.open_file("pruned/0")
    path.unlink()
    with pytest.raises(DamagedData, match="is missing"):
        RunDirectory.open(run.path).open_file("pruned/0")


def test_a_damaged_stream_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    root = run.path / run.payload("calibration").root
    one, other = (root / "c.0.0").read_bytes(), (root / "c.1.0").read_bytes()
    (root / "c.0.0").write_bytes(other)
    (root / "c.1.0").write_bytes(one)
    with pytest.raises(DamagedData, match="calibration of calibrate"):
        list(RunDirectory.open(run.path).open_stream("calibration"))


def test_a_link_out_of_the_run_directory_is_not_followed(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    root = run.path / run.payload("calibration").root
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedData, match="leads out"):
        run.open_stream("calibration")
    with pytest.raises(DamagedData, match="leads out"):
        run.release(["calibration"])
    assert (tmp_path / "elsewhere" / "zarr.json").exists()


# Attempts and commits


def test_a_step_is_done_once(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    with pytest.raises(StepOrderError, match="already done"):
        run.begin("calibrate")


def test_an_incomplete_stream_is_not_committed(run: RunDirectory) -> None:
    attempt = run.begin("calibrate")
    attempt.stream("calibration", 2, (4,), torch.int64).write(0, torch.arange(4))
    with pytest.raises(MissingChunk, match="sample 1"):
        commit(run, attempt)
    assert RunDirectory.open(run.path).commits == ()


def test_a_chunk_that_vanished_is_not_committed(run: RunDirectory) -> None:
    attempt = run.begin("calibrate")
    stream = attempt.stream("calibration", 1, (4,), torch.int64)
    stream.write(0, torch.arange(4))
    (stream.folder / "c.0.0").unlink()
    with pytest.raises(MissingChunk, match=r"c\.0\.0"):
        commit(run, attempt)


def test_nothing_is_committed_that_went_past_the_writer(run: RunDirectory) -> None:
    attempt = run.begin("export")
    folder = attempt.folder("model")
    folder.write("config.json", b"{}")
    (folder.path / "stray.bin").write_bytes(b"x")
    with pytest.raises(AssertionError, match=r"stray\.bin"):
        commit(run, attempt)


def test_a_payload_is_made_once(run: RunDirectory) -> None:
    attempt = run.begin("x")
    attempt.write_file("pruned/0", "a", b"x")
    for make in (
        lambda: attempt.write_file("pruned/0", "b", b"x"),
        lambda: attempt.folder("pruned/0"),
        lambda: attempt.stream("pruned/0", 1, (4,), torch.float32),
        lambda: attempt.folder("model").write("../../../run.json", b"x"),
        lambda: attempt.folder("../model"),
    ):
        with pytest.raises(ValueError, match=r"twice|plain relative path"):
            make()


def test_the_second_of_two_runners_is_superseded(run: RunDirectory) -> None:
    other = RunDirectory.open(run.path)
    attempt, late = run.begin("calibrate"), other.begin("calibrate")
    attempt.write_file("a", "a", b"ours")
    late.write_file("a", "a", b"theirs")
    first = commit(run, attempt)
    with pytest.raises(Superseded, match=r"000000\.json.*not damaged"):
        commit(other, late)
    assert RunDirectory.open(run.path).commits == (first,)
    assert run.open_file("a").read_bytes() == b"ours"


def test_a_commit_that_exists_already_may_be_ours(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    class LostAnswer(Calls):
        """The link is made, but word of it is lost and the try is repeated (as over a network)."""

        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            super().link(source, target)

    attempt = run.begin("calibrate")
    attempt.write_file("a", "a", b"x")
    monkeypatch.setattr(filesystem, "calls", LostAnswer())
    first = commit(run, attempt)
    assert RunDirectory.open(run.path).commits == run.commits == (first,)


def test_a_runner_left_behind_is_superseded_wherever_it_notices(tmp_path: Path) -> None:
    def left_behind(name: str) -> tuple[RunDirectory, Attempt]:
        """A runner at work on step 2 while another one has done it and tidied up."""
        winner = RunDirectory.create(tmp_path / name, manifest())
        do_step(winner, "calibrate")
        do_step(winner, "prune-block/0")
        late = RunDirectory.open(winner.path)
        attempt = late.begin("export")
        do_step(winner, "export")
        winner.release(["biased/1", "pruned/0"])
        winner.clean()
        assert not attempt.path.exists()
        return late, attempt

    for number, notice in enumerate(
        [
            lambda late, attempt: late.open_stream("biased/1"),
            lambda late, attempt: late.open_file("pruned/0"),
            lambda late, attempt: attempt.write_file("a", "a", b"x"),
            lambda late, attempt: attempt.stream("a", 1, (4,), torch.float32),
            lambda late, attempt: attempt.scratch(),
            lambda late, attempt: commit(late, attempt),
        ]
    ):
        with pytest.raises(Superseded):
            notice(*left_behind(str(number)))


def test_a_payload_of_another_run_is_taken_over_by_link(tmp_path: Path) -> None:
    one = go_on(tmp_path / "one")
    other = RunDirectory.create(tmp_path / "other", manifest(config={"sparsity": 0.7}))
    attempt = other.begin("calibrate")
    attempt.adopt("calibration", one.storage, one.payload("calibration"))
    commit(other, attempt)
    source, target = one.payload("calibration").root, other.payload("calibration").root
    assert (one.path / source / "c.0.0").samefile(other.path / target / "c.0.0")
    shutil.rmtree(one.path)
    assert [sample.tolist() for sample in RunDirectory.open(other.path).open_stream("calibration")] == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
    ]


def test_a_damaged_payload_is_not_taken_over(tmp_path: Path) -> None:
    one = go_on(tmp_path / "one")
    (one.path / one.payload("calibration").root / "c.0.0").write_bytes(b"x")
    other = RunDirectory.create(tmp_path / "other", manifest())
    with pytest.raises(DamagedData, match=r"c\.0\.0"):
        other.begin("calibrate").adopt("calibration", one.storage, one.payload("calibration"))


class NoLinks(Calls):
    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(go_on(tmp_path / "one"))
    monkeypatch.setattr(filesystem, "calls", NoLinks())
    run = go_on(tmp_path / "other")
    assert digests(RunDirectory.open(run.path)) == expected
    shard = run.payload("model").file("block-00000.safetensors")
    assert not (run.path / shard.path).samefile(run.path / run.payload("pruned/0").files[0].path)
    before = (run.path / "model").stat().st_ino
    run.publish("model")
    assert (run.path / "model").stat().st_ino == before


def test_what_is_linked_without_links_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = go_on(tmp_path / "run")
    file = run.payload("pruned/0").files[0]
    (run.path / file.path).write_bytes(b"W" * file.size)
    monkeypatch.setattr(filesystem, "calls", NoLinks())
    with pytest.raises(DamagedData):
        run.begin("export again").folder("model").link("a", file)


# Release, tidying, views


def test_release_frees_the_space_of_one_payload_and_may_run_twice(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    root = run.path / run.payload("pruned/0").root
    run.release(["pruned/0"])
    run.release(["pruned/0", "biased/1"])
    assert list(root.parent.iterdir()) == []
    assert (run.path / "model" / "block-00000.safetensors").read_bytes() == b"weights" * 9
    assert len(list(run.open_stream("calibration"))) == 2
    with pytest.raises(StepOrderError):
        run.release(["pruned/7"])


def test_cleaning_leaves_a_lease_that_is_being_renewed_alone(run):
    """The heartbeat of the process that cleans writes a temporary and renames it at any time."""
    young, old = run.path / ".lease.json.0123abcd.tmp", run.path / ".lease.json.89abcdef.tmp"
    for path in (young, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    run.clean()
    assert young.exists()
    assert not old.exists()


def test_clean_spares_attempts_at_a_step_to_come(run: RunDirectory) -> None:
    stale = run.begin("calibrate")
    stale.write_file("a", "a", b"x")
    do_step(run, "calibrate")
    current = run.begin("prune-block/0")
    (run.path / "commits" / ".000000.json.0123abcd.tmp").write_bytes(b"x")
    (run.path / "commits" / ".000001.json.0123abcd.tmp").write_bytes(b"x")
    (run.path / ".model.0123abcd.tmp").mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.clean()
    assert not stale.path.exists()
    assert current.path.exists()
    assert {path.name for path in (run.path / "commits").iterdir()} == {
        "000000.json",
        ".000001.json.0123abcd.tmp",
    }
    assert {path.name for path in run.path.iterdir()} == {"commits", "data", "notes.txt", "run.json"}
    assert len(list(RunDirectory.open(run.path).open_stream("calibration"))) == 2


def test_publish_shows_the_payload_and_leaves_a_right_view_alone(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    view = run.path / "model"
    assert {path.name for path in view.iterdir()} == {"block-00000.safetensors", "config.json", "README.md"}
    assert (view / "block-00000.safetensors").samefile(run.open_file("pruned/0"))
    before = view.stat().st_ino
    run.publish("model")
    assert view.stat().st_ino == before


def test_publish_replaces_a_wrong_view(tmp_path: Path) -> None:
    run = go_on(tmp_path / "run")
    (run.path / "model" / "config.json").unlink()
    (run.path / "model" / "config.json").write_text("another model's")
    (run.path / "model" / "old.safetensors").write_text("another model's")
    run.publish("model")
    assert {path.name for path in (run.path / "model").iterdir()} == {"block-00000.safetensors", "config.json"}
    assert (run.path / "model" / "config.json").read_bytes() == b'{"sum": 32}'
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("path", ["run.json", "data/x", "commits/000009.json", "../x", ".hidden", "lease.json"])
def test_a_view_is_never_written_over_what_counts(run: RunDirectory, path: str) -> None:
    with pytest.raises(ValueError, match=r"view|relative"):
        run.write_view(path, b"x")


def test_events_are_lines_of_json(run: RunDirectory) -> None:
    run.event("step-started", step="calibrate")
    run.event("progress", loss=float("nan"))
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step-started", "progress"]
    assert lines[0]["step"] == "calibrate"
    assert lines[1]["loss"] is None


# Crashes


class PowerCut(BaseException):
    """The machine is gone: nothing runs after that, no handler and no clean-up."""


class MortalDisk(Calls):
    """A disk that counts its operations and dies before the one numbered `last`.

    A `cut` (power, not only the process) also loses all that was not flushed: bytes of files, and names in
    folders. What was deleted stays deleted.
    """

    def __init__(self, last: float) -> None:
        self.count = 0
        self._last = last
        self._torn = -1
        self._unflushed_files: dict[int, int] = {}  # inode: size on the medium
        self._unflushed_names: dict[int, list[Path]] = {}  # inode of the folder: new names in it

    def _tick(self) -> None:
        if self.count >= self._last:
            raise PowerCut
        self.count += 1

    def _new_name(self, path: Path) -> None:
        self._unflushed_names.setdefault(path.parent.stat().st_ino, []).append(path)

    def create(self, path: Path) -> int:
        self._tick()
        descriptor = super().create(path)
        self._unflushed_files[os.fstat(descriptor).st_ino] = 0
        self._new_name(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._tick()
        is_first = self._unflushed_files.get(os.fstat(descriptor).st_ino) == 0 and self._torn != descriptor
        self._torn = descriptor
        # A file may be torn in the middle.
        return super().write(descriptor, data[: max(1, len(data) // 2)] if is_first else data)

    def flush(self, descriptor: int) -> None:
        """Only on this disk: the medium under it need not keep up."""
        self._tick()
        status = os.fstat(descriptor)
        self._unflushed_files.pop(status.st_ino, None)
        self._unflushed_names.pop(status.st_ino, None)

    def link(self, source: Path, target: Path) -> None:
        self._tick()
        super().link(source, target)
        self._new_name(target)

    def rename(self, source: Path, target: Path) -> None:
        self._tick()
        super().rename(source, target)
        self._new_name(target)

    def unlink(self, path: Path) -> None:
        self._tick()
        super().unlink(path)

    def make_folder(self, path: Path) -> None:
        self._tick()
        super().make_folder(path)
        self._new_name(path)

    def remove_folder(self, path: Path) -> None:
        self._tick()
        super().remove_folder(path)

    def lose_what_was_not_flushed(self, root: Path) -> None:
        for path in [path for path in root.rglob("*") if path.is_file()]:
            size = self._unflushed_files.get(path.stat().st_ino)
            if size is not None:
                os.truncate(path, size)
        for folder in self._unflushed_names.values():
            for path in folder:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def dies_and_goes_on(
    root: Path, last: float, monkeypatch: pytest.MonkeyPatch, *, cut: bool
) -> tuple[RunDirectory, MortalDisk]:
    mortal, promised = MortalDisk(last), []
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "calls", mortal)
        try:
            run = go_on(root / "run", promised)
        except PowerCut:
            run = None
    if run is None:
        if cut:
            mortal.lose_what_was_not_flushed(root)
        monkeypatch.setattr(filesystem, "calls", MortalDisk(float("inf")))
        if (root / "run" / "run.json").exists():
            survived = [commit.step for commit in RunDirectory.open(root / "run").commits]
            assert survived[: len(promised)] == promised, "a commit that had returned is gone"
        else:
            assert promised == []
        run = go_on(root / "run")
    return run, mortal


@pytest.mark.long
@pytest.mark.parametrize("cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_at_any_operation_changes_nothing_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    (tmp_path / "whole").mkdir()
    reference, whole = dies_and_goes_on(tmp_path / "whole", float("inf"), monkeypatch, cut=cut)
    expected = digests(reference)
    assert whole.count > 100
    for last in range(whole.count):
        root = tmp_path / str(last)
        root.mkdir()
        run, _ = dies_and_goes_on(root, last, monkeypatch, cut=cut)
        again = RunDirectory.open(run.path)
        assert digests(again) == expected, last
        assert {path.name for path in (run.path / "data").iterdir()} == {c.attempt for c in again.commits}, last
        assert not list(run.path.rglob(".*")), last
        for commit_ in again.commits:
            for name, payload in commit_.payloads.items():
                for file in payload.files:
                    if name != "biased/1":
                        again.open_file(name, payload.inner(file))
        for name in ("block-00000.safetensors", "config.json", "README.md"):
            assert (run.path / "model" / name).stat().st_size > 0, last
        shutil.rmtree(root)


class FullDisk(Calls):
    """A disk with room for the given number of bytes."""

    def __init__(self, room: int) -> None:
        self._room = room

    def write(self, descriptor: int, data: memoryview) -> int:
        if self._room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = super().write(descriptor, data[: self._room])
        self._room -= count
        return count


@pytest.mark.parametrize("room", range(0, 8000, 400))
def test_a_full_disk_costs_one_step_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    expected = digests(go_on(tmp_path / "reference"))
    promised: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "calls", FullDisk(room))
        reason = None
        try:
            go_on(tmp_path / "run", promised)
        except OutOfDisk as error:
            reason = str(error)
        assert room > 5000 if reason is None else str(tmp_path / "run") in reason
    if promised:
        assert [commit.step for commit in RunDirectory.open(tmp_path / "run").commits] == promised
    assert digests(go_on(tmp_path / "run")) == expected
