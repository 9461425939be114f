"""Image encoders from the command line: the same commands, features in the place of logits."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from stages.data.image_decoding import read_pixels
from stages.data.registry import parse_source
from stages.models.loader import loader_of
from stages.models.registry import open_model
from stages.models.resolve import resolve
from tests import small_encoders, warm_python
from tests.conftest import PRUNING_ALONE


@pytest.fixture
def data(tmp_path):
    small_encoders.pictures(tmp_path / "calibration", 4)
    small_encoders.pictures(tmp_path / "unseen", 5)
    return ("--calibration", "images:calibration", "--evaluate", "images:unseen", "--num-samples", "4")


@torch.no_grad()
def chain_features(folder, pixels):
    """The features that our own chain of blocks gives."""
    model, device = open_model(resolve(str(folder))), torch.device("cpu")
    ends = model.load_ends(device)
    entry = ends.enter(pixels)
    hidden = entry.hidden
    for index in range(model.num_blocks):
        hidden = model.run_block(model.load_block(index, device), hidden, entry.calls[index])
    return ends.leave(pixels, hidden)


@pytest.mark.parametrize(
    ("name", "method"),
    [("vit-classifier", "lamp"), ("dinov2", "wanda"), ("clip", "lamp"), ("clip-vision-projection", "sparsegpt")],
)
def test_an_exported_encoder_opens_in_transformers_with_every_tensor(lampctl, tmp_path, data, name, method):
    folder = small_encoders.save(tmp_path / "m", name)
    epochs = ("--epochs", "1", "--no-distill") if method == "lamp" else ()
    flags = ("--sparsity", "0.5", "--method", method, *data, *epochs, "--run-dir", "run")
    answer = lampctl("run", folder, *flags, "--json")
    assert answer.code == 0, answer.err
    dense, pruned = sorted(answer.json["evaluations"], key=lambda e: e["which"])
    assert dense["metric"] == pruned["metric"] == "feature_cosine"
    assert dense["feature_cosine"] == pytest.approx(1, abs=1e-12)
    assert 0.1 < pruned["lowest"] <= pruned["feature_cosine"] < 0.9999
    assert pruned["num_images"] == 5

    exported = tmp_path / "run" / "model"
    kind = type(small_encoders.build(name))
    theirs, said = kind.from_pretrained(exported, output_loading_info=True)
    assert not any(said[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    original, model = load_file(folder / "model.safetensors"), open_model(resolve(str(folder)))
    found = {key: tensor for file in exported.glob("*.safetensors") for key, tensor in load_file(file).items()}
    layers = {
        model.stored_names(index)[f"{layer.path}.weight"]
        for index in range(model.num_blocks)
        for layer in model.layers(index)
    }
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], original[key]) for key in original.keys() - layers)
    assert sum(int((found[key] == 0).sum()) for key in layers) == sum(found[key].numel() for key in layers) // 2

    records, _ = parse_source(f"images:{tmp_path / 'unseen'}").records()
    pixels = torch.stack([model.processor.pixels(read_pixels(record)) for record in records])
    ours, before = chain_features(exported, pixels), chain_features(folder, pixels)
    assert torch.equal(ours, small_encoders.features(theirs.eval(), pixels))
    cosine = torch.cosine_similarity(ours.double(), before.double()).mean().item()
    assert pruned["feature_cosine"] == pytest.approx(cosine, abs=1e-6)
    card = (exported / "README.md").read_text()
    assert f"from transformers import AutoImageProcessor, {kind.__name__}\n" in card
    assert f'model = {kind.__name__}.from_pretrained("PATH/TO/THIS/FOLDER", dtype="float32")' in card
    assert (exported / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()


def test_a_classifier_is_loaded_with_its_head(lampctl, tmp_path):
    folder = small_encoders.save(tmp_path / "m", "vit-classifier")
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--evaluate", "", "--run-dir", "run")
    answer = lampctl("run", folder, *flags)
    assert answer.code == 0, answer.err
    assert 'ViTForImageClassification.from_pretrained("run/model", dtype="float32")' in answer.out
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["MyOwnNet"]}))
    assert loader_of(tmp_path, "AutoModel") == "AutoModel"


def test_status_evaluate_compare_and_report_know_the_metric(lampctl, tmp_path, data):
    folder = small_encoders.save(tmp_path / "m", "vit")
    answer = lampctl("run", folder, "--sparsity", "0.5", "--method", "magnitude", *data[2:4], "--run-dir", "run")
    assert answer.code == 0, answer.err
    assert "feature cosine" in lampctl("status", "run").out
    again = lampctl("evaluate", "run", "--evaluate", "images:calibration", "--eval-max-images", "2", "--json")
    assert again.code == 0, again.err
    last = again.json["evaluations"][-1]
    assert (last["is_partial"], last["num_images"]) == (True, 2)
    assert (
        lampctl("evaluate", folder, "--data", "images:unseen", "--json").json["measured"][0]["feature_cosine"]
        > 1 - 1e-12
    )
    assert lampctl("compare", "run", "--json").code == 0
    assert lampctl("report", "run", "--out", "page").code == 0
    assert lampctl("verify", "run").code == 0


BOMB = """
import os, signal, sys
from pipeline.engine import runner as engine

kind, count = sys.argv.pop(1), 0
report = engine.StepCallbacks.report

def explode(self, done, total, unit, **figures):
    global count
    report(self, done, total, unit, **figures)
    count += self._step.kind == kind
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)

engine.StepCallbacks.report = explode
sys.argv[:1] = ["lampctl"]
from lampctl.app import main
main()
"""


def test_a_killed_run_of_an_encoder_resumes_to_the_same_bits(lampctl, tmp_path, data):
    folder = small_encoders.save(tmp_path / "m", "dinov2")
    flags = ("run", str(folder), "--sparsity", "0.5", *data, "--epochs", "1", *PRUNING_ALONE, "--run-dir")
    whole = lampctl(*flags, "whole", "--json")
    assert whole.code == 0, whole.err
    files = sorted(path.name for path in (tmp_path / "whole" / "model").glob("*.safetensors"))
    assert len(files) == 4
    for kind in ("compensate-block", "evaluate"):
        killed = warm_python.run(BOMB, kind, *flags, kind, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (kind, killed.stderr)
        resumed = lampctl("resume", kind, "--json")
        assert resumed.code == 0, (kind, resumed.err)
        for name in files:
            expected = (tmp_path / "whole" / "model" / name).read_bytes()
            assert (tmp_path / kind / "model" / name).read_bytes() == expected, (kind, name)
        assert resumed.json["evaluations"] == whole.json["evaluations"]


def test_pictures_that_cannot_be_read_are_counted(lampctl, tmp_path, data):
    folder = small_encoders.save(tmp_path / "m", "vit")
    (tmp_path / "unseen" / "000.png").write_bytes(b"")
    answer = lampctl("evaluate", folder, "--data", "images:unseen", "--json")
    assert answer.code == 0, answer.err
    measured = answer.json["measured"][0]
    assert (measured["num_images"], measured["skipped"]) == (4, {"broken": 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--calibration", "pydocs"),
            "a model for image features, reads images: name one of sa1b:DIR, coco:DIR, images:DIR",
        ),
        (("--calibration", "calibration"), "; for a folder of pictures, images:calibration"),
        (("--calibration", "images:calibration/000.png"), "is a file: name the folder that it lies in"),
        ((), "--calibration is missing: name images"),
        (("--calibration", "images:calibration", "--num-samples", "4", "--seqlen", "64"), "--seqlen: every sample of"),
        (("--calibration", "images:calibration", "--num-samples", "9"), "has 4 images, 9 are needed"),
        (
            ("--calibration", "images:calibration", "--num-samples", "4", "--eval-points", "random"),
            "is a model for image features; points are about segmentation masks",
        ),
    ],
)
def test_wrong_arguments_are_named(lampctl, tmp_path, data, arguments, says):
    folder = small_encoders.save(tmp_path / "m", "vit")
    answer = lampctl("run", folder, "--sparsity", "0.5", "--run-dir", "run", *arguments)
    assert answer.code == 2, answer.err
    assert says in answer.err
