"""Algorithm 1 in memory and `lampctl run`, which commits every step to disk, give bit-identical weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.steps.stage_settings import prunable_layers
from stages.allocate import outlier_shares
from stages.calibrate import calibrate
from stages.data.drawing import Drawing
from stages.data.registry import parse_source
from stages.in_memory import ListScratch, ListStream, NullCallbacks
from stages.lamp import LampSettings, lamp
from stages.machine.device import DeviceChoices
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.sparsity.budget import allocate
from stages.sparsity.owl import budget_by_outliers
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import context_of, pruner_named
from tests.small_models import save

N, T = 5, 16
AMOUNT = ("--num-samples", N, "--seqlen", T, "--evaluate", "", "--device", "cpu", "--threads", 1, "--micro-batch", 1)
LOW = TrainingSettings(1, Rate(1e-3), 0.9, True, 0, "token")
MSE = TrainingSettings(2, Rate(5e-4), 0.9, False, 0, "mse")


def exported(run):
    """All tensors of the exported model of a run."""
    return {name: tensor for path in (run / "model").glob("*.safetensors") for name, tensor in load_file(path).items()}


TRAINED = ("--sparsity", 0.6, "--pruner", "sparsegpt", "--lr-decay", 0.9, "--alpha", 0.9, "--beta", 0)
CASES = {
    "lamp, refined": (
        (*TRAINED, "--epochs", 1, "--lr", 1e-3, "--refine-epochs", 1, "--refine-lr", 1e-3),
        lambda: LampSettings(pruner_named("sparsegpt"), LOW, LOW),
    ),
    "lamp as published": (
        (*TRAINED, "--epochs", 2, "--lr", 5e-4, "--no-refine", "--loss", "mse", "--no-hold-aside"),
        lambda: LampSettings(pruner_named("sparsegpt"), MSE),
    ),
    "alps": (("--sparsity", 0.6, "--method", "alps", "--alpha", 0.9), lambda: LampSettings(pruner_named("alps"))),
    "wanda": (("--sparsity", 0.6, "--method", "wanda", "--alpha", 0.9), lambda: LampSettings(pruner_named("wanda"))),
}


@pytest.mark.parametrize("family", ["opt", "llama-gqa"])
@pytest.mark.parametrize("case", CASES)
def test_in_memory_and_on_disk_the_bits_are_the_same(lampctl, tmp_path, words, family, case):
    folder = save(tmp_path / "m", family)
    flags, settings = CASES[case]
    call = ("run", folder, *flags, *AMOUNT, "--no-distill", "--calibration", f"text:{words}", "--run-dir", "r")
    answer = lampctl(*call)
    assert answer.code == 0, answer.err
    found = exported(tmp_path / "r")

    model, inputs = drawn(folder, words)
    budget = allocate(prunable_layers(model, ()), 0.6, 0.9, 0.0)
    for block in lamp(context_of(model, inputs, precision_of(tmp_path / "r")), budget, settings()):
        names = model.stored_names(block.index)
        for name, tensor in block.finished.state.items():
            assert torch.equal(tensor, found[names[name]]), names[name]


def test_a_budget_that_follows_the_data_is_the_one_of_a_run(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "llama-gqa")
    flags = ("--sparsity", 0.6, "--method", "sparsegpt", "--budget", "outliers", "--budget-spread", 0.1)
    answer = lampctl("run", folder, *flags, *AMOUNT, "--calibration", f"text:{words}", "--run-dir", "r")
    assert answer.code == 0, answer.err
    found = exported(tmp_path / "r")
    model, inputs = drawn(folder, words)
    context, shapes = context_of(model, inputs, precision_of(tmp_path / "r")), prunable_layers(model, ())
    names = {layer.name for block in shapes for layer in block}

    def budget(hidden):
        shares = outlier_shares(context, hidden, names, ListScratch())
        return budget_by_outliers(shapes, shares, 0.1, 0.6, 1.0, 0.0)[0]

    for block in lamp(context, budget, LampSettings(pruner_named("sparsegpt"))):
        stored = model.stored_names(block.index)
        assert all(torch.equal(tensor, found[stored[name]]) for name, tensor in block.finished.state.items())


def drawn(folder, words):
    """The model, and the calibration set that a run samples."""
    model = open_model(resolve(str(folder)))
    source = parse_source(f"text:{words}")
    tokens = calibrate(source, model.source, Drawing(N, T, "contiguous"), NullCallbacks())
    inputs = ListStream(N, (T,), torch.long)
    for index, sample in enumerate(tokens):
        inputs.write(index, sample)
    return model, inputs


def precision_of(run):
    """The device choices that the run recorded."""
    return DeviceChoices(**json.loads((run / "run.json").read_text())["environment"]["device"])


def test_plain_magnitude_needs_no_samples(tmp_path):
    model = open_model(resolve(str(save(tmp_path / "m", "opt"))))
    budget = allocate(prunable_layers(model, ()), 0.5, 1.0, 0.0)
    blocks = list(lamp(context_of(model, ()), budget, LampSettings(pruner_named("magnitude"))))
    assert [block.index for block in blocks] == list(range(model.num_blocks))
    assert all(block.compensation is None and block.refinement is None for block in blocks)


def test_settings_that_need_missing_streams_are_refused(tmp_path):
    with pytest.raises(ValueError, match="refinement needs compensation"):
        LampSettings(pruner_named("sparsegpt"), refinement=LOW)
    model = open_model(resolve(str(save(tmp_path / "m", "opt"))))
    with pytest.raises(ValueError, match="depends on data"):
        next(lamp(context_of(model, ()), lambda hidden: (), LampSettings(pruner_named("magnitude"))))


def test_lamp_compensates_with_a_pruner_that_needs_no_data(tmp_path, words):
    model, inputs = drawn(save(tmp_path / "m", "opt"), words)
    budget = allocate(prunable_layers(model, ()), 0.5, 1.0, 0.0)
    blocks = list(lamp(context_of(model, inputs), budget, LampSettings(pruner_named("magnitude"), MSE)))
    assert [block.compensation is not None for block in blocks] == [False, *[True] * (model.num_blocks - 1)]
