"""Small projections that steer a whole block stay dense, unless the user says otherwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig

from tests.conftest import PRUNING_ALONE
from tests.small_models import VOCAB, tokenizer

FLAGS = (
    *("--sparsity", "0.5", "--method", "wanda", "--num-samples", "2", "--seqlen", "16", "--evaluate", ""),
    *PRUNING_ALONE,
)
DATA = ("--calibration", "text:words.txt", "--device", "cpu")


@pytest.fixture
def mamba(tmp_path, words):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=2, conv_kernel=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer().save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def budget(run):
    blocks = json.loads((Path(run) / "run.json").read_text())["budget"]
    return {layer["name"]: layer for block in blocks for layer in block["layers"]}


def test_they_stay_as_they_were_and_do_not_count(lampctl, mamba):
    answer = lampctl("run", mamba, *FLAGS, *DATA, "--run-dir", "r")
    assert answer.code == 0, answer.err
    said = " ".join(answer.err.split())
    assert "2 small layers stay dense and do not count towards the sparsity: x_proj steer" in said
    assert "--prune-all" in said
    layers = budget("r")
    assert {name.rpartition(".")[2] for name in layers} == {"in_proj", "out_proj"}
    total = sum(layer["size"] for layer in layers.values())
    assert sum(layer["num_masked"] for layer in layers.values()) == round(0.5 * total)
    before = load_file(mamba / "model.safetensors")
    after = {}
    for path in Path("r/model").glob("*.safetensors"):
        after.update(load_file(path))
    vital = [name for name in before if "x_proj" in name or "dt_proj" in name]
    assert len(vital) == 6
    assert all(torch.equal(before[name], after[name]) for name in vital)


def test_prune_all_prunes_them_too(lampctl, mamba):
    answer = lampctl("run", mamba, *FLAGS, *DATA, "--run-dir", "r", "--prune-all")
    assert answer.code == 0, answer.err
    assert "stay dense" not in answer.err
    layers = budget("r")
    assert {name.rpartition(".")[2] for name in layers} == {
        "in_proj",
        "out_proj",
        "x_proj",
    }  # no input of dt_proj can be seen
    assert all(layer["num_masked"] for layer in layers.values())


def test_a_budget_by_outliers_leaves_them_out(lampctl, mamba):
    answer = lampctl("run", mamba, *FLAGS, *DATA, "--run-dir", "r", "--budget", "outliers")
    assert answer.code == 0, answer.err
    masks = {name for path in Path("r/model/masks").iterdir() for name in load_file(path)}
    assert masks == {
        f"backbone.layers.{index}.mixer.{name}.mask" for index in (0, 1) for name in ("in_proj", "out_proj")
    }
