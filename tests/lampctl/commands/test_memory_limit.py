"""`--memory-limit`, `--micro-batch` and `--threads` from the user's side, and what a run says of its memory."""

import json
import re
from pathlib import Path

import pytest

from stages.machine import device
from stages.runtime import memory_planner
from tests.conftest import PRUNING_ALONE
from tests.killed_runs import exported_weights
from tests.small_models import save

DATA = (
    *("--sparsity", "0.5", "--calibration", "text:words.txt", "--num-samples", "4", "--seqlen", "32"),
    *("--effort", "low", "--evaluate", "", "--device", "cpu", *PRUNING_ALONE),
)


@pytest.fixture(autouse=True)
def _words(words):
    """The file that DATA names."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "m", "llama")


def device_of(run):
    return json.loads((run / "run.json").read_text())["environment"]["device"]


def test_too_low_memory_limit_is_refused_with_the_lowest_possible(lampctl, model, tmp_path):
    answer = lampctl("run", model, *DATA, "--memory-limit", "100MB", "--run-dir", tmp_path / "run")
    assert answer.code == 5
    assert "--memory-limit 0.10GB is too little: this run needs" in answer.err
    assert "training" in answer.err
    assert not (tmp_path / "run").exists()
    amounts = [float(figure) for figure in re.findall(r"([\d.]+)GB", answer.err.partition("this run needs")[2])]
    needed, *details = amounts
    assert needed == max(details), "the largest step is what the run needs"
    refused = lampctl("run", model, *DATA, "--memory-limit", f"{needed - 0.05:.2f}GB", "--run-dir", tmp_path / "run")
    assert refused.code == 5
    assert not (tmp_path / "run").exists()
    assert lampctl("init", model, *DATA, "--memory-limit", f"{needed:.2f}GB", "--run-dir", tmp_path / "run").code == 0
    assert lampctl("resume", tmp_path / "run").code == 0
    answer = lampctl("run", model, *DATA, "--memory-limit", "lots", "--run-dir", tmp_path / "run")
    assert answer.code == 2
    assert "--memory-limit lots: expected a size such as 8GB" in answer.err


def test_memory_limit_may_change_at_resume_but_micro_batch_stays(lampctl, model, tmp_path):
    run = tmp_path / "run"
    assert lampctl("init", model, *DATA, "--memory-limit", "8GB", "--run-dir", run).code == 0
    assert device_of(run)["batch_tokens"] == 8 * 32
    answer = lampctl("run", model, *DATA, "--memory-limit", "8.5 GiB", "--run-dir", run)
    assert answer.code == 0, answer.err
    assert device_of(run)["batch_tokens"] == 8 * 32
    free = [json.loads(path.read_text())["free"] for path in sorted((run / "commits").iterdir())]
    assert {values["memory_limit"] for values in free} == {"8.5 GiB"}


def test_threads_and_micro_batch_are_what_the_run_computes_with(lampctl, model, tmp_path):
    run = tmp_path / "run"
    assert lampctl("init", model, *DATA, "--threads", "1", "--micro-batch", "3", "--run-dir", run).code == 0
    assert device_of(run)["num_threads"] == 1
    assert device_of(run)["batch_tokens"] == 3 * 32
    answer = lampctl("run", model, *DATA, "--micro-batch", "2", "--run-dir", run)
    assert answer.code == 3
    assert "micro_batch" in answer.err


def test_status_shows_peak_memory_by_step_kind(lampctl, model, tmp_path):
    run = tmp_path / "run"
    assert lampctl("run", model, *DATA, "--run-dir", run).code == 0
    shown = lampctl("status", run).out
    assert "peak memory" in shown
    for kind in ("capture", "prune-block", "refine-block", "compensate-block", "export"):
        assert kind in shown
    state = json.loads(lampctl("status", run, "--json").out)
    assert all(step["peak_memory_bytes"] > 10**8 for step in state["steps"])
    pruning = [step for step in state["steps"] if step["kind"] != "end-loss"]  # measurements do not count
    assert state["peak_memory_bytes"] == max(step["peak_memory_bytes"] for step in pruning)
    assert state["peak_device_bytes"] is None


def test_compiling_without_a_compiler_is_refused(lampctl, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    answer = lampctl("run", model, *DATA, "--compile", "--run-dir", tmp_path / "run")
    assert answer.code == 2
    assert "--compile needs a C++ compiler" in answer.err


def test_step_above_the_memory_limit_warns(lampctl, model, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.machine.device.PeakMemory.process_bytes", lambda self: 9 * 10**9)
    answer = lampctl("run", model, *DATA, "--memory-limit", "8GB", "--run-dir", tmp_path / "run")
    assert answer.code == 0
    assert "this step took 9.00 GB, more than --memory-limit 8GB" in answer.err


def test_a_container_with_little_memory_left_is_warned_of_and_the_weights_stay(lampctl, model, monkeypatch):
    assert lampctl("run", model, *DATA, "--method", "sparsegpt", "--run-dir", "ample").code == 0
    monkeypatch.setattr(device, "memory_left", lambda: 0)
    answer = lampctl("run", model, *DATA, "--method", "sparsegpt", "--run-dir", "short")
    assert answer.code == 0, answer.err
    (warning,) = (line for line in answer.err.splitlines() if "are free here" in line)
    assert warning.startswith("warning: this run may need ")
    assert "Free some, or use a smaller --seqlen" in warning
    assert exported_weights(Path("short")) == exported_weights(Path("ample"))


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_computed(lampctl, model, monkeypatch, tmp_path):
    """Planned as for a GPU: this test needs none."""
    room = memory_planner.Room
    monkeypatch.setattr(memory_planner, "Room", lambda available, limit, is_device: room(10**8, limit, is_device=True))
    answer = lampctl("run", model, *DATA, "--run-dir", "run")
    assert answer.code == 5
    assert "this run needs" in answer.err
    assert "of GPU memory" in answer.err
    assert "and 0.10GB are free" in answer.err
    assert not (tmp_path / "run").exists()
