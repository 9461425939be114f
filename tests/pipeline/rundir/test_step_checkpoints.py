"""Progress records: what is kept, what is passed over, what goes."""

from datetime import UTC, datetime

import pytest
import torch

from pipeline.engine.callbacks import StepCallbacks
from pipeline.engine.job import Job
from pipeline.engine.plan import Step
from pipeline.engine.stop import StopRequest
from pipeline.errors import OutOfDisk, Preempted, Superseded
from pipeline.rundir import step_checkpoints
from pipeline.rundir.records import Result
from pipeline.rundir.run_directory import RunDirectory, StepReport
from pipeline.rundir.step_checkpoints import StepProgress
from stages.interfaces import Checkpoint
from tests.pipeline.rundir.test_run_directory import manifest

STEP = "compensate-block/1"


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", manifest())


def records(run):
    folder = run.path / run.progress_folder
    return sorted(folder.iterdir()) if folder.exists() else []


def checkpoint(number):
    return Checkpoint({"w": torch.full((3,), float(number)), "empty": torch.empty(0)}, {"number": number})


def number_in(found):
    return found and found.figures["number"]


def commit(run, step):
    attempt = run.begin(step)
    run.commit(attempt, StepReport(Result(), {}, datetime.now(UTC), 0.0))


def test_every_bit_comes_back(run):
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, 1e-45]),
        "bf16": torch.randn(4, 5).bfloat16(),
        "step": torch.tensor(3.0),
        "turned": torch.randn(3, 4).T,
    }
    figures = {"loss": 0.1 + 0.2, "none": None, "infinite": float("inf"), "list": [[1, 2.5]]}
    StepProgress(run, STEP).save(Checkpoint(tensors, figures))
    found = StepProgress(run, STEP).restore()
    assert found.figures == figures
    for name, tensor in tensors.items():
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(found.tensors[name].contiguous().view(bits), tensor.contiguous().view(bits))


def test_the_newest_two_are_kept_and_the_newest_is_used(run):
    assert StepProgress(run, STEP).restore() is None
    for number in range(4):
        StepProgress(run, STEP).save(checkpoint(number))
    assert [path.name for path in records(run)] == ["000002", "000003"]
    assert number_in(StepProgress(run, STEP).restore()) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text", "folder", "link"])
def test_a_damaged_record_is_passed_over_for_the_one_before_it(run, damage, tmp_path):
    for number in range(2):
        StepProgress(run, STEP).save(checkpoint(number))
    newest = records(run)[-1]
    data = newest.read_bytes()
    newest.unlink()
    if damage == "flip":
        newest.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif damage == "truncate":
        newest.write_bytes(data[:-1])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "text":
        newest.write_text("not a record")
    elif damage == "folder":
        newest.mkdir()
    else:
        (tmp_path / "elsewhere").write_bytes(data)
        newest.symlink_to(tmp_path / "elsewhere")
    assert number_in(StepProgress(run, STEP).restore()) == 0
    StepProgress(run, STEP).save(checkpoint(5))
    assert number_in(StepProgress(run, STEP).restore()) == 5


def test_a_record_of_another_step_or_another_history_is_not_used(run, tmp_path):
    StepProgress(run, STEP).save(checkpoint(1))
    assert StepProgress(run, "prune-block/1").restore() is None
    other = RunDirectory.create(tmp_path / "other", manifest(created_at=datetime(2020, 1, 1, tzinfo=UTC)))
    folder = other.path / other.progress_folder
    folder.mkdir(parents=True)
    (folder / "000000").write_bytes(records(run)[0].read_bytes())
    assert StepProgress(other, STEP).restore() is None
    assert number_in(StepProgress(run, STEP).restore()) == 1


def test_the_records_of_a_step_go_when_it_is_done(run):
    StepProgress(run, STEP).save(checkpoint(1))
    assert run.leftovers() == []
    folder = run.progress_folder
    commit(run, STEP)
    assert folder in run.leftovers()
    run.clean()
    assert not (run.path / folder).exists()


def test_the_seconds_of_earlier_attempts_count(run):
    progress = StepProgress(run, STEP)
    progress.elapsed_before_s = 100.0
    progress.save(checkpoint(1))
    again = StepProgress(run, STEP)
    again.restore()
    assert again.elapsed_s >= 100


def test_a_full_disk_costs_the_record_and_nothing_else(run, monkeypatch):
    def full(key, data):
        raise OutOfDisk("no room left")

    monkeypatch.setattr(run.storage, "create", full)
    StepProgress(run, STEP).save(checkpoint(1))
    assert StepProgress(run, STEP).restore() is None


def test_whoever_is_superseded_hears_of_it(run):
    late = RunDirectory.open(run.path)
    commit(run, STEP)

    def gone(key, data):
        from pipeline.errors import FileGone

        raise FileGone("the folder is gone")

    late.storage.create = gone
    with pytest.raises(Superseded):
        StepProgress(late, STEP).save(checkpoint(1))


class Listener:
    def __init__(self):
        self.resumed = []

    def step_resumed(self, step):
        self.resumed.append(step.name)

    def warn(self, message):
        raise AssertionError(message)


def callbacks(run, stop, every_s):
    step = Step("compensate-block", 1)
    job = Job(run, [step], worker=None, listener=Listener(), stop=stop, runtime={}, checkpoint_every_s=every_s)
    return StepCallbacks(job, step, StepProgress(run, STEP))


def never(error):
    raise AssertionError(error)


def test_a_checkpoint_is_kept_when_it_is_time_and_when_the_stage_is_stopped(run):
    stop = StopRequest(never, grace_s=3600)
    seldom = callbacks(run, stop, 3600.0)
    seldom.checkpoint(lambda: checkpoint(0))
    callbacks(run, stop, 0.0).checkpoint(lambda: checkpoint(0))
    assert records(run) == []
    often = callbacks(run, stop, 1e-9)
    often.checkpoint(lambda: checkpoint(1))
    assert len(records(run)) == 1
    stop.request(Preempted("the machine goes away"))
    with pytest.raises(Preempted):
        seldom.checkpoint(lambda: checkpoint(2))
    assert number_in(StepProgress(run, STEP).restore()) == 2


def test_whoever_listens_is_told_that_a_step_goes_on_from_a_checkpoint(run):
    stop = StopRequest(never, grace_s=3600)
    first = callbacks(run, stop, 1e-9)
    assert first.restore() is None
    assert first._job.listener.resumed == []
    first.checkpoint(lambda: checkpoint(1))
    again = callbacks(run, stop, 1e-9)
    assert number_in(again.restore()) == 1
    assert again._job.listener.resumed == ["compensate-block/1"]


def part(value):
    return {"w": torch.full((4,), float(value)), "adam.step.w": torch.tensor(1.0)}


def parts_on_disk(run):
    return sorted(path.name for path in records(run) if path.name.startswith("part-"))


def value_of(progress, name):
    return progress.kept(name)["w"][0].item()


def with_parts(number, *names):
    return Checkpoint(figures={"number": number}, parts=names)


def test_parts_come_back_as_the_checkpoint_named_them(run):
    progress = StepProgress(run, STEP)
    for name in ("a", "b"):
        progress.keep(name, part(1))
    progress.save(with_parts(1, "a", "b"))
    progress.keep("a", part(2))  # an update that is not finished
    assert value_of(progress, "a") == 2
    again = StepProgress(run, STEP)
    assert number_in(again.restore()) == 1
    assert (value_of(again, "a"), value_of(again, "b")) == (1, 1)
    assert torch.equal(again.kept("a")["adam.step.w"], torch.tensor(1.0))
    assert len(parts_on_disk(run)) == 2, "the part of the unfinished update is gone"


def test_a_part_that_is_damaged_or_gone_costs_the_checkpoints_that_name_it(run):
    progress = StepProgress(run, STEP)
    for number in (1, 2):
        for name in ("a", "b"):
            progress.keep(name, part(number))
        progress.save(with_parts(number, "a", "b"))
    assert len(parts_on_disk(run)) == 4
    newest = run.path / run.progress_folder / parts_on_disk(run)[-1] / "part.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again = StepProgress(run, STEP)
    assert number_in(again.restore()) == 1
    assert value_of(again, "b") == 1
    for name in parts_on_disk(run):
        run.storage.remove(f"{run.progress_folder}/{name}")
    last = StepProgress(run, STEP)
    assert last.restore() is None


def test_parts_that_no_checkpoint_names_any_more_are_deleted(run):
    progress = StepProgress(run, STEP)
    for number in range(6):
        progress.keep("a", part(number))
        progress.save(with_parts(number, "a"))
        assert len(parts_on_disk(run)) == min(number + 1, 2)
    progress.keep("a", part(7))
    progress.keep("a", part(8))
    assert len(parts_on_disk(run)) == 3, "two that checkpoints name, and the newest"
    commit(run, STEP)
    run.clean()
    assert not (run.path / "progress").exists() or not list((run.path / "progress").iterdir())


def test_a_record_cannot_name_a_part_outside_its_folder(run):
    progress = StepProgress(run, STEP)
    progress.keep("a", part(1))
    parts = {"a": {"folder": "../../data/x", "size": 1, "sha256": "0" * 64}}
    data = step_checkpoints._encode(with_parts(1, "a"), progress._binding, 0.0, parts)
    run.storage.create(f"{run.progress_folder}/000000", data)
    assert StepProgress(run, STEP).restore() is None


def test_a_part_deleted_by_another_process_ends_the_step_as_superseded(run):
    progress = StepProgress(run, STEP)
    progress.keep("a", part(1))
    StepProgress(run, STEP).restore()  # another process begins the step, and finds a part that no checkpoint names
    with pytest.raises(Superseded, match="another process does the same step"):
        progress.kept("a")
