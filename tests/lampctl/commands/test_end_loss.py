"""Every run states how far its model's output is from the original's, on samples that training holds out."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lampctl.output.end_loss import end_loss_lines, worse_than_baselines
from pipeline.config.run_config import RunConfig
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.lifecycle import reopen
from pipeline.runs.status import status
from pipeline.steps.end_loss import EndLossStep
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.lamp_plan import steps_of
from pipeline.testing.steps import check_reports
from tests import small_encoders, small_sam
from tests.killed_runs import exported_weights
from tests.pipeline.runs.golden_copy import copy_of_golden
from tests.small_models import save

DATA = ("--calibration", "text:words.txt", "--num-samples", 34, "--seqlen", 16, "--calibration-sampling", "random")
SHORT = ("--sparsity", 0.6, *DATA, "--evaluate", "", "--device", "cpu")
LAMP = (*SHORT, "--epochs", 1, "--refine-epochs", 1)
HELD_OUT = (8, 25)  # of 34 samples: the middles of both halves


def steps(run: str) -> list[str]:
    return [json.loads(path.read_text())["step"] for path in sorted(Path(run, "commits").iterdir())]


def calibration(run: str) -> list[torch.Tensor]:
    stream = RunDirectory.open(run).open_stream("calibration")
    return [stream[index] for index in range(len(stream))]


@torch.no_grad()
def divergence(dense, pruned, samples) -> float:
    """By whole models of transformers and whole logits."""
    losses = []
    for sample in samples:
        expected = dense(sample[None].long()).logits[0].double().log_softmax(-1)
        found = pruned(sample[None].long()).logits[0].double().log_softmax(-1)
        losses.append(functional.kl_div(found, expected, reduction="batchmean", log_target=True).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", (*LAMP,)),
        ("opt", (*SHORT, "--method", "wanda", "--export-dtype", "bfloat16")),
        ("llama-gqa", (*SHORT, "--method", "sparsegpt", "--bits", 4)),
        ("gpt2", (*SHORT, "--method", "wanda", "--distill", "--distill-batch", 8)),
    ],
)
def test_it_is_the_divergence_of_whole_models_on_the_held_out_samples(lampctl, tmp_path, words, family, flags):
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "m", family)
    answer = lampctl("run", folder, *flags, "--json", "--run-dir", "r")
    assert answer.code == 0, answer.err
    found = answer.json["end_loss"]
    dense, pruned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, "r/model"))
    samples = [calibration("r")[number] for number in HELD_OUT]
    expected = divergence(dense, pruned, samples)
    assert expected > 1e-3
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert (found["loss"], found["num_samples"], found["num_tokens"]) == ("kl", 2, 32)
    assert (found["is_held_out"], found["num_trained_on"]) == (True, 0)
    line = f"KL divergence to the dense model {expected:.4g} on 2 held-out samples"
    assert f"end-loss: {line}" in answer.err
    assert f"dense model: {expected:.4g} on 2 held-out samples (calibration" in Path("r/model/README.md").read_text()
    assert line in lampctl("status", "r").out
    assert line.replace("model ", "model: ") in lampctl("resume", "r").out


def test_segment_anything(lampctl, tmp_path):
    from transformers import SamModel

    folder = small_sam.save(tmp_path / "sam")
    images = f"coco:{small_sam.coco(tmp_path / 'images')}"
    flags = ("--sparsity", 0.5, "--method", "wanda", "--calibration", images, "--num-samples", 4, "--evaluate", "")
    answer = lampctl("run", folder, *flags, "--device", "cpu", "--json", "--run-dir", "r")
    assert answer.code == 0, answer.err
    (pixels,) = (calibration("r")[number] for number in (2,))
    with torch.no_grad():
        dense, pruned = (
            SamModel.from_pretrained(f).eval().get_image_embeddings(pixels[None]) for f in (folder, "r/model")
        )
    expected = ((pruned - dense).square().sum() / dense.square().sum()).item()
    assert answer.json["end_loss"]["value"] == pytest.approx(expected, rel=1e-4)
    assert f"relative error of the output to the dense model's {expected:.4g} on 1 held-out sample" in answer.err


def test_image_encoders(lampctl, tmp_path):
    from transformers import Dinov2Model

    folder = small_encoders.save(tmp_path / "m", "dinov2")
    small_encoders.pictures(tmp_path / "pictures", 4)
    flags = ("--sparsity", 0.5, "--method", "wanda", "--calibration", "images:pictures", "--num-samples", 4)
    answer = lampctl("run", folder, *flags, "--evaluate", "", "--device", "cpu", "--json", "--run-dir", "r")
    assert answer.code == 0, answer.err
    pixels = calibration("r")[2][None]
    with torch.no_grad():
        dense, pruned = (
            Dinov2Model.from_pretrained(f).eval()(pixel_values=pixels).last_hidden_state[:, 0]
            for f in (folder, "r/model")
        )
    expected = ((pruned - dense).square().sum() / dense.square().sum()).item()
    assert answer.json["end_loss"]["value"] == pytest.approx(expected, rel=1e-4)


def test_the_samples_are_the_same_whether_or_not_the_method_trains(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "llama")
    answer = lampctl("run", folder, *LAMP, "--baseline", "wanda", "--baseline", "magnitude", "--json", "--run-dir", "r")
    assert answer.code == 0, answer.err
    ours, (wanda, magnitude) = answer.json["end_loss"], (one["end_loss"] for one in answer.json["baselines"])
    assert ours["samples_sha256"] == wanda["samples_sha256"]
    assert ours["value"] != wanda["value"]
    assert magnitude is None
    assert "end-loss" not in steps("r-magnitude")
    assert "--end-loss" not in answer.err
    compared = lampctl("compare", "r", "r-wanda", "r-magnitude", "--json").json
    figures = [row["figures"].get("end_loss/kl") for row in compared["rows"]]
    assert [figure["value"] if figure else None for figure in figures] == [ours["value"], wanda["value"], None]
    title = next(column["title"] for column in compared["columns"] if column["key"] == "end_loss/kl")
    assert title == "KL divergence to the dense model words.txt, 2 samples"


def test_other_samples_get_a_column_of_their_own(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "llama")
    for run, seed in (("a", 0), ("b", 1)):
        assert lampctl("run", folder, *SHORT, "--method", "wanda", "--seed", seed, "--run-dir", run).code == 0
    compared = lampctl("compare", "a", "b", "--json").json
    keys = [column["key"] for column in compared["columns"] if column["key"].startswith("end_loss/kl:")]
    assert len(set(keys)) == 2


def test_the_only_sample_is_measured_and_that_is_said(lampctl, tmp_path, words):
    flags = ("--sparsity", 0.6, "--method", "wanda", *DATA, "--num-samples", 1, "--evaluate", "", "--device", "cpu")
    answer = lampctl("run", save(tmp_path / "m", "llama"), *flags, "--run-dir", "r")
    assert answer.code == 0, answer.err
    assert "on the calibration sample itself" in answer.out


def test_samples_that_were_trained_on_are_not_called_held_out(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "llama")
    flags = ("--sparsity", 0.6, *DATA, "--epochs", 1, "--no-refine", "--no-held-out", "--evaluate", "")
    answer = lampctl("run", folder, *flags, "--device", "cpu", "--json", "--run-dir", "r")
    assert answer.json["end_loss"]["num_trained_on"] == 2
    assert "on 2 calibration samples that training has seen, too" in answer.err


@pytest.mark.parametrize(("size", "held_out", "num_seen"), [(48, (8, 24, 40), 1), (47, (11, 35), 2)])
def test_a_distillation_set_may_hold_measured_samples(lampctl, tmp_path, words, size, held_out, num_seen):
    folder, flags = save(tmp_path / "m", "llama"), (*SHORT, "--method", "wanda", "--run-dir")
    assert lampctl("init", folder, *flags, "own", "--num-samples", size).code == 0
    assert lampctl("calibrate", "own").code == 0
    distill = ("--distill-samples", size, "--distill-batch", 16, "--json")
    answer = lampctl("run", folder, *flags, "r", *distill)
    assert answer.code == 0, answer.err
    trained = [sample.tolist() for number, sample in enumerate(calibration("own")) if number not in held_out]
    assert sum(calibration("r")[number].tolist() in trained for number in HELD_OUT) == num_seen
    assert answer.json["end_loss"]["num_trained_on"] == num_seen
    if num_seen == 1:  # sample 8 is held out of both sets
        assert "on 2 calibration samples, 1 of which training has seen, too" in answer.err


def test_it_can_be_left_out_and_added_and_changes_no_weight(lampctl, tmp_path, words):
    folder, flags = save(tmp_path / "m", "llama"), (*SHORT, "--method", "sparsegpt", "--run-dir")
    assert lampctl("run", folder, *flags, "with").code == 0
    assert lampctl("run", folder, *flags, "r", "--no-end-loss").code == 0
    assert "end-loss" not in steps("r")
    assert lampctl("status", "r", "--json").json["end_loss"] is None
    added = lampctl("evaluate", "r", "--end-loss", "--json")
    assert added.code == 0, added.err
    assert added.json["end_loss"] == lampctl("status", "with", "--json").json["end_loss"]
    assert exported_weights(Path("r")) == exported_weights(Path("with"))
    assert lampctl("verify", "r", "--deep").code == 0
    assert lampctl("report", "r", "--out", "page", "--no-text").code == 0
    assert "KL divergence to the dense model" in Path("page/index.html").read_text()

    assert (
        lampctl("run", folder, "--sparsity", 0.5, "--method", "magnitude", "--evaluate", "", "--run-dir", "m0").code
        == 0
    )
    refused = lampctl("evaluate", "m0", "--end-loss")
    assert refused.code == 2
    assert "no calibration set" in refused.err
    refused = lampctl("evaluate", "r/model", "--end-loss")
    assert refused.code == 2
    assert "belongs to no run" in refused.err


def test_a_run_without_it_is_taken_over(lampctl, tmp_path, words):
    folder, flags = save(tmp_path / "m", "llama"), (*SHORT, "--method", "wanda")
    assert lampctl("run", folder, *flags, "--no-end-loss", "--run-dir", "plain").code == 0
    told = lampctl("run", folder, *flags, "--distill", "--from-run", "plain", "--run-dir", "more")
    assert told.code == 0, told.err
    assert steps("more")[-2:] == ["export", "end-loss"]
    assert "on 2 held-out samples" in told.out


def test_a_run_of_a_version_without_it_stays_finished(lampctl, tmp_path, words, monkeypatch):
    folder, flags = save(tmp_path / "m", "llama"), (*SHORT, "--method", "wanda", "--run-dir", "r")
    as_json = RunConfig.as_json
    with monkeypatch.context() as older:
        older.setattr(RunConfig, "as_json", lambda self: {k: v for k, v in as_json(self).items() if k != "end_loss"})
        older.setattr(EndLossStep, "after_export", classmethod(lambda cls, config: ()))
        assert lampctl("run", folder, *flags).code == 0
    assert "end_loss" not in json.loads(Path("r/run.json").read_text())["config"]
    before = {path: path.read_bytes() for path in Path("r/commits").iterdir()}
    for again in (("run", folder, *flags), ("resume", "r"), ("evaluate", "r")):
        answer = lampctl(*again)
        assert answer.code == 0, answer.err
        assert {path: path.read_bytes() for path in Path("r/commits").iterdir()} == before, again
        assert lampctl("status", "r", "--json").json["is_finished"]
    assert "on 2 held-out samples" in lampctl("evaluate", "r", "--end-loss").out


@pytest.mark.parametrize("schema", [1, 2])
def test_golden_runs_gain_no_step(schema, tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "r", schema=schema))
    assert config.end_loss is None
    assert "end-loss" not in [step.name for step in steps_of(run, config)]
    assert status(run, config).is_finished


def test_a_method_that_is_worse_than_its_baseline_warns(lampctl, tmp_path, words):
    from tests.conftest import TINY_OPT

    short = (*SHORT, "--num-samples", 8)
    spoilt = ("--epochs", 1, "--no-refine", "--no-held-out", "--no-distill", "--lr", 0.3)
    answer = lampctl("run", TINY_OPT, *short, *spoilt, "--baseline", "sparsegpt", "--run-dir", "r")
    assert answer.code == 0
    (warning,) = (line for line in answer.err.splitlines() if "worse than" in line)
    assert warning.startswith("warning: LAMP is worse than SparseGPT here: KL divergence to the dense model ")
    assert "--lr below 0.3" in warning
    assert warning.endswith("or use SparseGPT's model in r-sparsegpt/model")
    assert "LAMP " in answer.out
    as_json = lampctl("run", TINY_OPT, *short, *spoilt, "--baseline", "sparsegpt", "--run-dir", "r", "--json")
    assert as_json.json["warnings"] == [warning.removeprefix("warning: ")]

    better = lampctl("run", TINY_OPT, *short, "--method", "sparsegpt", "--baseline", "magnitude", "--run-dir", "s")
    assert better.code == 0
    assert "worse than" not in better.err
    sparse = ("--method", "wanda", "--sparsity", 0.8)
    assert "worse than" not in lampctl("run", TINY_OPT, *short, *sparse, "--run-dir", "w").err  # no baseline: no claim


def found(value: float | None = 0.5, **changes) -> EndLossResult:
    fields = {"loss": "kl", "title": "KL", "num_samples": 8, "num_tokens": 64, "source": "c4"}
    digest = hashlib.sha256(b"samples").hexdigest()
    return EndLossResult(
        **{**fields, "value": value, "samples_sha256": digest, "is_held_out": True, "num_trained_on": 0, **changes}
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "warns"),
    [
        (found(0.5), found(0.4), True),
        (found(0.4), found(0.5), False),
        (found(0.5), found(0.5), False),
        (found(None), found(0.5), True),
        (found(0.5), found(None), False),
        (found(0.5), found(0.4, samples_sha256="0" * 64), False),
        (found(0.5), None, False),
        (None, found(0.5), False),
    ],
)
def test_only_a_higher_loss_on_the_same_samples_is_worse(tmp_path, ours, theirs, warns):
    state = status(*reopen(copy_of_golden(tmp_path / "r")))
    other = replace(state, config=state.config.changed(method="sparsegpt", refine=None))
    states = [replace(state, end_loss=ours), replace(other, end_loss=theirs)]
    assert bool(worse_than_baselines(states)) == warns
    assert not worse_than_baselines(states[:1])


def test_what_each_method_was_measured_on_is_said_where_they_differ(tmp_path):
    state = status(*reopen(copy_of_golden(tmp_path / "r")))
    other = replace(state, config=state.config.changed(method="sparsegpt"), end_loss=found(0.4))
    assert end_loss_lines([replace(state, end_loss=found(0.5)), other]) == [
        "KL on 8 held-out samples: LAMP 0.5, SparseGPT 0.4"
    ]
    assert end_loss_lines([replace(state, end_loss=found(0.5, num_trained_on=8)), other]) == [
        "KL: LAMP 0.5 on 8 calibration samples that training has seen, too; SparseGPT 0.4 on 8 held-out samples"
    ]
    assert end_loss_lines([replace(state, end_loss=None)]) == []


@pytest.mark.parametrize("result", [found(), found(None), found(num_trained_on=None), found(is_held_out=False)])
def test_its_reports_have_the_form_of_the_kit(result):
    check_reports(EndLossStep, result)


def test_an_overflow_is_shown():
    assert EndLossStep.headline(found(None)) == "KL infinite on 8 held-out samples"
    assert (
        found(num_trained_on=None).measured_on == "on 8 calibration samples that distillation may have been trained on"
    )
