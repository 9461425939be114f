"""Sweeps from the command line: trials share their first steps, one that fails ends nothing, a kill costs one step."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest

from tests import warm_python
from tests.conftest import PRUNING_ALONE
from tests.small_models import save

FLAGS = (
    *("--num-samples", "4", "--seqlen", "32", "--epochs", "1", "--refine-epochs", "1", "--eval-max-tokens", "256"),
    *PRUNING_ALONE,
)


@pytest.fixture
def given(tmp_path, words):
    """The model and the text of all sweeps here."""
    save(tmp_path / "m", "llama-gqa")
    return ("m", "--calibration", "text:words.txt", "--evaluate", "text:words.txt", *FLAGS)


def steps(run: Path) -> dict[str, dict]:
    return {c["step"]: c for c in (json.loads(p.read_text()) for p in sorted((run / "commits").glob("*.json")))}


def test_grid_sweep_finishes_and_shares_the_first_steps(lampctl, given, tmp_path):
    grid = ("--grid", "sparsity=0.5,0.7", "--grid", "method=lamp,sparsegpt,magnitude")
    answer = lampctl("sweep", *given, *grid, "--sweep-dir", "s", "--json")
    assert answer.code == 0, answer.err
    trials = answer.json["trials"]
    assert [t["state"] for t in trials] == ["done"] * 6
    assert len({t["value"] for t in trials}) == 6
    assert [round(t["sparsity"], 2) for t in trials] == [0.5] * 3 + [0.7] * 3

    (stem,) = (tmp_path / "s" / "shared").iterdir()
    (title,) = [line for line in answer.err.splitlines() if line.endswith(str(stem))]
    assert title.startswith("calibration set and first activations for several trials: ")
    assert list(steps(stem)) == ["calibrate", "capture"]
    for name in ("sparsity-0.5_method-lamp", "sparsity-0.7_method-sparsegpt"):
        trial = steps(tmp_path / "s" / "trials" / name)
        for step in ("calibrate", "capture"):
            assert trial[step]["result"]["shared_with"]
        for payload, of_stem in steps(stem)["capture"]["payloads"].items():
            if payload in trial["capture"]["payloads"]:
                files = trial["capture"]["payloads"][payload]["files"]
                assert [f["sha256"] for f in files] == [f["sha256"] for f in of_stem["files"]]

    # The very weights that a run of its own gives.
    alone = lampctl("run", *given, "--sparsity", "0.7", "--run-dir", "alone", "--no-evaluate-dense")
    assert alone.code == 0, alone.err
    for name in ("pruned/0", "pruned/2"):
        step = f"refine-block/{name[-1]}"
        ours = steps(tmp_path / "s" / "trials" / "sparsity-0.7_method-lamp")[step]["payloads"][name]["files"]
        plain = steps(tmp_path / "alone")[step]["payloads"][name]["files"]
        assert [f["sha256"] for f in ours] == [f["sha256"] for f in plain]

    shown = lampctl("sweep", "status", "s")
    assert "6 of 6 trials are done" in shown.out
    again = lampctl("sweep", *given, *grid, "--sweep-dir", "s")
    assert again.code == 0
    assert "[1/" not in again.err  # nothing was done


def test_failed_trial_is_reported_and_the_sweep_continues(lampctl, given):
    call = ("sweep", *given, "--sparsity", "0.5", "--grid", "num_samples=4,100000,5", "--sweep-dir", "s")
    answer = lampctl(*call)
    assert answer.code == 7
    assert "100000 samples" in answer.err or "100,000" in answer.err or "are needed" in answer.err
    states = {t["trial"]: t["state"] for t in lampctl("sweep", "status", "s", "--json").json["trials"]}
    assert states == {"num_samples-4": "done", "num_samples-100000": "failed", "num_samples-5": "done"}
    assert "num_samples-100000 failed" in lampctl("sweep", "status", "s").out
    assert lampctl("sweep", "resume", "s").code == 7


BOMB = """
import os, signal, sys
from pipeline.engine import runner as engine

count = 0
report = engine.StepCallbacks.report

def explode(self, done, total, unit, **figures):
    global count
    report(self, done, total, unit, **figures)
    count += self._step.kind == "refine-block"
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)

engine.StepCallbacks.report = explode
sys.argv[:1] = ["lampctl"]
from lampctl.app import main
main()
"""


def test_killed_sweep_resumes_to_the_same_values(lampctl, given, tmp_path):
    grid = ("--grid", "sparsity=0.5,0.7", "--grid", "method=lamp,sparsegpt")
    quiet = lampctl("sweep", *given, *grid, "--sweep-dir", "quiet", "--json")
    killed = warm_python.run(BOMB, "sweep", *given, *grid, "--sweep-dir", "killed", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = lampctl("sweep", "status", "killed", "--json").json["trials"]
    assert "begun" in {t["state"] for t in before}
    after = lampctl("sweep", "resume", "killed", "--json")
    assert after.code == 0, after.err
    assert [t["value"] for t in after.json["trials"]] == [t["value"] for t in quiet.json["trials"]]


@pytest.mark.slow
def test_stopped_search_samples_the_same_points(lampctl, given, tmp_path, monkeypatch):
    search = ("--sparsity", "0.6", "--search", "alpha=0.6:1.0,lr=1e-4:1e-2:log", "--trials", "4")
    whole = lampctl("sweep", *given, *search, "--sweep-dir", "whole", "--json")
    assert whole.code == 0, whole.err
    points = [t["settings"] for t in whole.json["trials"]]
    assert len(points) == 4
    assert all(0.6 <= p["alpha"] <= 1.0 and 1e-4 <= p["lr"] <= 1e-2 for p in points)
    from pipeline.errors import Preempted
    from pipeline.sweeps import sweep

    resume, calls = sweep.resume, []

    def stops_once(run, *args, **kwargs):
        calls.append(run)
        if len(calls) == 4:
            raise Preempted("stopped")
        return resume(run, *args, **kwargs)

    monkeypatch.setattr(sweep, "resume", stops_once)
    stopped = lampctl("sweep", *given, *search, "--sweep-dir", "stopped")
    assert stopped.code == 75
    resumed = lampctl("sweep", "resume", "stopped", "--json")
    assert resumed.code == 0, resumed.err
    assert [(t["settings"], t["value"]) for t in resumed.json["trials"]] == [
        (t["settings"], t["value"]) for t in whole.json["trials"]
    ]
    assert "best: trial" in lampctl("sweep", "status", "whole").out
    report = lampctl("sweep", "report", "whole", "--out", "page")
    assert report.code == 0, report.err
    assert (tmp_path / "page" / "index.html").exists()


def test_sweep_report_lists_every_trial(lampctl, given, tmp_path):
    grid = ("--grid", "sparsity=0.4,0.8", "--grid", "method=sparsegpt,magnitude")
    done = lampctl("sweep", *given, *grid, "--sweep-dir", "s", "--json")
    assert done.code == 0, done.err
    report = lampctl("sweep", "report", "s", "--out", "page")
    assert report.code == 0, report.err
    rows = list(csv.DictReader((tmp_path / "page" / "trials.csv").open()))
    pruned = {row["trial"]: float(row["value"]) for row in rows if row["which"] == "pruned"}
    assert pruned == {t["trial"]: t["value"] for t in done.json["trials"]}
    page = (tmp_path / "page" / "index.html").read_text()
    for trial in done.json["trials"]:
        assert f"{trial['value']:,.2f}" in page
    assert len(list((tmp_path / "page" / "figures").glob("*.png"))) == 1


def test_sweep_dir_with_another_sweep_is_refused(lampctl, given, tmp_path):
    assert lampctl("sweep", *given, "--grid", "sparsity=0.5", "--method", "magnitude", "--sweep-dir", "s").code == 0
    other = lampctl("sweep", *given, "--grid", "sparsity=0.6", "--method", "magnitude", "--sweep-dir", "s")
    assert other.code == 3
    assert "holds another sweep" in other.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    full = lampctl("sweep", *given, "--grid", "sparsity=0.6", "--sweep-dir", "full")
    assert full.code == 2
    assert "holds no sweep" in full.err
    assert lampctl("sweep", "status", "nowhere").code == 2


@pytest.mark.parametrize(("field", "value"), [("sparsity", 7), ("model", None), ("nonsense", 1)])
def test_sweep_json_with_invalid_settings_is_damaged(lampctl, given, tmp_path, field, value):
    assert lampctl("sweep", *given, "--grid", "sparsity=0.5", "--method", "magnitude", "--sweep-dir", "s").code == 0
    path = tmp_path / "s" / "sweep.json"
    content = json.loads(path.read_text())
    content["settings"][field] = value
    path.write_text(json.dumps(content))
    answer = lampctl("sweep", "resume", "s")
    assert answer.code == 4
    assert "sweep.json is damaged" in answer.err


def test_vision_sweep_overrides_the_presets_text(lampctl, tmp_path):
    from tests import small_sam

    small_sam.save(tmp_path / "sam")
    images = f"coco:{small_sam.coco(tmp_path / 'images')}"
    call = ("sweep", "sam", "--preset", "quick", "--num-samples", "2", "--calibration", images, "--sparsity", "0.5")
    answer = lampctl(*call, "--grid", "method=magnitude,wanda", "--sweep-dir", "s", "--json")
    assert answer.code == 0, answer.err
    assert [trial["state"] for trial in answer.json["trials"]] == ["done", "done"]
