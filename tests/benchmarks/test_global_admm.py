"""Global ADMM, which the quality benchmark compares with: counts, what it leaves alone, and that it learns."""

import json

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.global_admm import Settings, prune
from tests import warm_python
from tests.conftest import TINY_OPT

SETTINGS = Settings(sparsity=0.6, epochs=2, batch=2, lr=2e-3, penalty=0.01, interval=2)


def model():
    return AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows():
    from pydoc_data.topics import topics

    ids = AutoTokenizer.from_pretrained(TINY_OPT)(topics["compound"]).input_ids
    return torch.tensor(ids[: 40 * 64]).view(40, 64)


def in_blocks(name):
    return "layers." in name and name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))


def magnitude(pruned, sparsity):
    with torch.no_grad():
        for name, weight in pruned.named_parameters():
            if in_blocks(name):
                least = weight.abs().flatten().topk(round(sparsity * weight.numel()), largest=False).indices
                weight.view(-1)[least] = 0
    return pruned


@torch.no_grad()
def loss_of(found, windows):
    return float(torch.stack([found(ids[None], labels=ids[None]).loss for ids in windows]).mean())


def test_every_layer_has_its_share_of_zeros_and_nothing_else_changes(windows):
    pruned, before = model(), dict(model().named_parameters())
    losses = prune(pruned, windows[:4], SETTINGS)
    assert len(losses) == 4
    for name, weight in pruned.named_parameters():
        if in_blocks(name):
            assert int((weight == 0).sum()) == round(0.6 * weight.numel())
        else:
            assert torch.equal(weight, before[name]), name


def test_without_a_step_kept_weights_are_the_original_ones(windows):
    pruned = model()
    prune(pruned, windows[:2], Settings(sparsity=0.6, epochs=1, batch=2, lr=0.0, penalty=0.01, interval=2))
    kept = {name: weight for name, weight in pruned.state_dict().items() if in_blocks(name)}
    original = model().state_dict()
    assert all(torch.equal(weight[weight != 0], original[name][weight != 0]) for name, weight in kept.items())


def test_it_is_better_than_magnitude_on_text_that_it_has_not_seen(windows):
    pruned = model()
    prune(pruned, windows[:32], Settings(sparsity=0.7, epochs=2, batch=2, lr=1e-3, penalty=1.0, interval=8))
    assert loss_of(pruned, windows[32:]) < 0.98 * loss_of(magnitude(model(), 0.7), windows[32:])


def test_the_script_leaves_a_folder_that_opens(windows, tmp_path):
    (tmp_path / "model").symlink_to(TINY_OPT)
    numpy.save(tmp_path / "windows.npy", windows[:2].numpy())
    root = TINY_OPT.parents[1]
    script = root / "benchmarks/quality/global_admm.py"
    told = warm_python.run(warm_python.SCRIPT, script, tmp_path, "--sparsity", "0.5", cwd=root)
    assert told.returncode == 0, told.stderr
    figures = json.loads(told.stdout.splitlines()[-1])
    # Three epochs of one batch: the first loss is the original model's.
    assert len(figures["losses"]) == 3
    assert figures["losses"][0] == pytest.approx(loss_of(model(), windows[:2]), abs=1e-3)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    shares = [float((weight == 0).float().mean()) for name, weight in weights.items() if in_blocks(name)]
    assert shares == pytest.approx([0.5] * len(shares), abs=1e-3)
