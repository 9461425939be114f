"""A run on another machine or with other versions; two runners; a wall of time; nothing left to do."""

import importlib.metadata
import json
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import PRUNING_ALONE
from tests.small_models import save

FLAGS = ("--sparsity", "0.5", "--num-samples", "3", "--seqlen", "16", "--evaluate", "", "--epochs", "1", *PRUNING_ALONE)


@pytest.fixture
def begun(lampctl, tmp_path, words):
    """A run of three blocks, after its first steps; gives the flags that began it."""
    flags = (save(tmp_path / "m", "llama"), *FLAGS, "--calibration", f"text:{words}", "--run-dir", "r")
    assert lampctl("init", *flags).code == 0
    for command in ("calibrate", "capture", "prune-block"):
        assert lampctl(command, "r").code == 0
    return flags


def records():
    return [json.loads(path.read_text()) for path in sorted(Path("r/commits").iterdir())]


def pretend(monkeypatch, name, version):
    from pipeline.runs import environment

    real = environment.importlib.metadata.version
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda p: version if p == name else real(p))


def test_other_versions_are_refused_unless_allowed_and_then_written_into_the_chain(lampctl, begun, monkeypatch):
    real = importlib.metadata.version
    pretend(monkeypatch, "torch", "99.0")
    num_before = len(records())
    answer = lampctl("resume", "r")
    assert answer.code == 3
    assert "torch is 99.0 here, it was" in answer.err
    assert "--allow-environment-change" in answer.err
    assert lampctl("run", *begun).code == 3
    assert lampctl("refine-block", "r").code == 3
    assert len(records()) == num_before
    for command in ("status", "verify"):
        assert lampctl(command, "r").code == 0
    answer = lampctl("resume", "r", "--allow-environment-change")
    assert answer.code == 0, answer.err
    assert "torch is 99.0 here" in answer.err
    change = records()[num_before]
    assert change["step"] == "environment"
    assert change["result"]["environment"]["packages"]["torch"] == "99.0"
    status = lampctl("status", "r")
    assert "torch is 99.0 here" in status.out
    # Finished: nobody computes anything any more, and every machine may look at it.
    monkeypatch.setattr(importlib.metadata, "version", real)
    assert lampctl("resume", "r").code == 0
    assert lampctl("export", "r", "--format", "packed").code == 0


def test_allow_other_versions_can_be_given_to_run(lampctl, tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (save(tmp_path / "m", "llama"), *FLAGS, "--calibration", f"text:{words}", "--run-dir", "r")
    assert lampctl("init", *flags, "--allow-environment-change").code == 0
    pretend(monkeypatch, "transformers", "99.0")
    assert lampctl("calibrate", "r").code == 0
    assert records()[0]["step"] == "environment"
    assert lampctl("resume", "r").code == 0


def test_allow_other_versions_by_environment_variable(lampctl, begun, monkeypatch):
    pretend(monkeypatch, "torch", "99.0")
    monkeypatch.setenv("LAMPCTL_ALLOW_ENVIRONMENT_CHANGE", "1")
    assert lampctl("resume", "r").code == 0


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_other_versions_can_be_allowed_by_every_command_that_does_steps(lampctl, begun, words, monkeypatch, how):
    allowed = ("--allow-environment-change",) if how == "flag" else ()
    variable = "LAMPCTL_ALLOW_ENVIRONMENT_CHANGE"

    def allowing(*call):
        with monkeypatch.context() as patch:
            if how == "variable":
                patch.setenv(variable, "1")
            return lampctl(*call, *allowed)

    pretend(monkeypatch, "torch", "99.0")
    assert lampctl("refine-block", "r").code == 3
    answer = allowing("refine-block", "r")
    assert answer.code == 0, answer.err
    assert lampctl("resume", "r", "--refuse-environment-change").code == 0
    pretend(monkeypatch, "torch", "99.1")
    measure = ("evaluate", "r", "--data", f"text:{words}", "--seqlen", "32")
    refused = lampctl(*measure)
    assert refused.code == 3
    assert "the same command with --allow-environment-change" in refused.err
    answer = allowing(*measure)
    assert answer.code == 0, answer.err
    assert "torch is 99.1 here" in answer.err


def test_other_device_is_refused_by_name(lampctl, begun, monkeypatch):
    monkeypatch.setattr("stages.machine.device._processor_name", lambda: "Another Processor 9000")
    answer = lampctl("resume", "r")
    assert answer.code == 3
    assert "cpu is Another Processor 9000 here" in answer.err


def test_a_lost_stream_that_has_other_bits_on_another_machine_is_committed_anew(lampctl, begun, monkeypatch):
    """As on a new machine with an empty scratch disk, which can only compute other bits."""
    import shutil

    lost = next(c for c in records() if c["step"] == "prune-block/0")["payloads"]
    name = "unrefined/0"
    assert name in lost
    stream = next(c for c in records() if c["step"] == "capture")["payloads"]["dense/1"]["root"]
    shutil.rmtree(Path("r", stream))
    from stages.models.decoder import Decoder

    run_block = Decoder.run_block
    monkeypatch.setattr(Decoder, "run_block", lambda *args: run_block(*args) * (1 + 2**-20))
    answer = lampctl("resume", "r")
    assert answer.code == 4
    assert "gives other bits here" in answer.err
    answer = lampctl("resume", "r", "--allow-environment-change")
    assert answer.code == 0, answer.err
    assert "dense/1 has other bits here" in answer.err
    assert "rebuild/dense/1" in [record["step"] for record in records()]
    assert lampctl("verify", "r", "--deep").code == 0


def test_second_runner_is_refused_unless_takeover(lampctl, begun, monkeypatch):
    from pipeline.rundir.lease import Lease, Timing
    from pipeline.rundir.run_directory import RunDirectory

    lost: list[BaseException] = []
    with Lease(RunDirectory.open("r"), lost.append, print, timing=Timing(0.05, 0.5)):
        answer = lampctl("resume", "r")
        assert answer.code == 6
        assert "--takeover" in answer.err
        status = lampctl("status", "r")
        assert "is being worked on by process" in status.out
        assert lampctl("resume", "r", "--takeover").code == 0
    assert len(lost) <= 1
    assert not Path("r/lease.json").exists()


def test_max_time_stops_with_75_and_the_same_command_resumes(lampctl, begun, monkeypatch):
    from stages import prune_block as stage

    prune = stage.prune_block

    def slowly(*args, **kwargs):
        time.sleep(0.4)
        return prune(*args, **kwargs)

    monkeypatch.setattr(stage, "prune_block", slowly)
    answer = lampctl("resume", "r", "--max-runtime", "0.3s")
    assert answer.code == 75
    assert "allowed run time of 0.3s is over" in answer.err
    assert lampctl("resume", "r", "--max-runtime", "none").code == 0
    assert lampctl("resume", "r", "--max-runtime", "soon").code == 2


def test_preemption_notice_stops_a_run_with_75(lampctl, begun):
    from tests.pipeline.engine.test_preemption import Metadata

    service = Metadata()
    service.preempted.set()
    try:
        answer = lampctl("resume", "r", "--watch-preemption", "aws", "--preemption-url", service.url)
        assert answer.code in (0, 75)  # a run of milliseconds may be faster
        if answer.code == 75:
            assert "AWS is about to take this machine away" in answer.err
    finally:
        service.server.shutdown()


def test_resume_of_a_finished_run_changes_nothing_and_takes_two_seconds(lampctl, begun):
    assert lampctl("resume", "r").code == 0
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in Path("r").rglob("*")}
    num_threads = threading.active_count()
    for command in (("resume", "r"), ("run", *begun)):
        start = time.monotonic()
        answer = lampctl(*command)
        assert answer.code == 0, answer.err
        assert time.monotonic() - start < 2
        assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in Path("r").rglob("*")} == before
    assert threading.active_count() <= num_threads + 2, "each call leaves threads behind"
