"""Mixtures of experts through every pruner, Algorithm 1 and the export, as the router routes them."""

import json
import re
from dataclasses import replace

import pytest
import torch

from stages.allocate import outlier_shares
from stages.capture import capture
from stages.formats.pruning_masks import read_mask_file
from stages.in_memory import ListScratch, ListStream
from stages.lamp import LampSettings, lamp
from stages.models.decoder import open_model
from stages.models.in_memory import open_in_memory
from stages.models.resolve import resolve
from stages.pruners.sparsegpt import SparseGPT
from stages.sparsity.nm_pattern import Pattern
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import FP32, budget_of, context_of, pruner_named
from tests.small_experts import FAMILIES, NUM_EXPERTS, build, loaded, save
from tests.small_models import VOCAB
from tests.small_models import build as build_dense
from tests.small_models import save as save_dense
from tests.stages.test_lamp import AMOUNT, exported

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

N, T = 6, 16
IDS = torch.randint(4, VOCAB, (N, T), generator=torch.Generator().manual_seed(3))
FEW = ("mixtral", "gpt-oss")
EVERY = tuple(f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)


def inputs_of(ids):
    stream = ListStream(len(ids), (ids.shape[1],), torch.long)
    for i, sample in enumerate(ids):
        stream.write(i, sample)
    return stream


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("goal", [0.6, Pattern(2, 4)], ids=str)
def test_every_pruner_meets_its_budget_in_every_expert(method, goal):
    model = open_in_memory(build("qwen2-moe"))
    budget = budget_of(model, goal)
    pattern = goal if isinstance(goal, Pattern) else None
    blocks = lamp(
        context_of(model, inputs_of(IDS)), budget, LampSettings(pruner_named(method, pattern=pattern), None, None)
    )
    total = masked = 0
    for i, block in enumerate(blocks):
        for info, layer in zip(model.layers(i), budget[i].layers, strict=True):
            mask = block.outcome.layers[info.name].mask
            assert int(mask.sum()) == layer.num_masked
            weight = block.finished.state[f"{info.path}.weight"]
            assert torch.all(weight[mask] == 0)
            assert not torch.all(weight[~mask] == 0)
            if pattern is not None:
                assert torch.all(mask.reshape(info.rows, -1, 4).sum(2) == 2)
            total, masked = total + mask.numel(), masked + int(mask.sum())
    assert masked == round(0.5 * total if pattern else goal * total)


def test_an_expert_without_a_token_is_pruned_by_the_statistics_of_all():
    model = build("gpt-oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[5] = -1000
    decoder = open_in_memory(model)
    context = context_of(decoder, inputs_of(IDS))
    block = next(iter(lamp(context, budget_of(decoder, 0.5), LampSettings(pruner_named("sparsegpt"), None, None))))
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = block.outcome.layers[f"model.layers.0.mlp.experts.5.{name}"]
        assert layer.mask.float().mean() == 0.5
        assert layer.relative_error is not None
    assert re.search(r"block 0: \d of 8 experts received fewer .* mlp\.experts\.\d 0:", str(context.callbacks.warnings))


def test_all_tokens_of_all_experts_give_one_hessian(monkeypatch):
    """Then the mask of every expert follows from the inputs of the whole layer."""
    model = open_in_memory(build("mixtral"))
    seen = []
    prepare = SparseGPT.prepare

    def counted(self, statistics, **rest):
        seen.append(statistics)
        return prepare(self, statistics, **rest)

    monkeypatch.setattr(SparseGPT, "prepare", counted)
    pruner = pruner_named("sparsegpt", calibrates_all_experts=True)
    context = context_of(model, inputs_of(IDS))
    block = next(iter(lamp(context, budget_of(model, 0.5), LampSettings(pruner, None, None))))
    # q, k and v share one; so do gate and up of all experts; each expert has its own for down.
    assert len(seen) == 2 + 1 + NUM_EXPERTS
    assert not context.callbacks.warnings
    assert len(block.outcome.layers) == len(model.layers(0))


@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v2", "deepseek-v3", "glm4-moe"])
@pytest.mark.parametrize("num_samples", [1, N], ids=["fewer tokens than channels", "enough tokens"])
@pytest.mark.parametrize("to_all", [False, True])
def test_a_shared_expert_is_pruned_beside_the_others(family, num_samples, to_all):
    """It has no peers; with all tokens for all experts, that of Qwen2-MoE reads the same tensor as they."""
    model = open_in_memory(build(family))
    pruner = pruner_named("sparsegpt", calibrates_all_experts=to_all)
    context = context_of(model, inputs_of(IDS[:num_samples]))
    settings = LampSettings(pruner, None, None)
    for index, block in enumerate(lamp(context, budget_of(model, 0.5), settings)):
        masks = {name: layer.mask for name, layer in block.outcome.layers.items()}
        assert masks.keys() == {info.name for info in model.layers(index)}
        assert all(mask.float().mean() == 0.5 for mask in masks.values())


@pytest.mark.parametrize("bits", [None, 4])
def test_training_reaches_the_experts_and_keeps_their_masks(bits):
    model = open_in_memory(build("gpt-oss"))
    training = TrainingSettings(1, Rate(1e-3), 0.9, False, 0)
    pruner = pruner_named("sparsegpt", bits=bits)
    plain = list(lamp(context_of(model, inputs_of(IDS)), budget_of(model, 0.5), LampSettings(pruner, None, None)))
    trained = list(
        lamp(context_of(model, inputs_of(IDS)), budget_of(model, 0.5), LampSettings(pruner, training, training))
    )
    for i, (before, after) in enumerate(zip(plain, trained, strict=True)):
        changed = 0
        for info in model.layers(i):
            mask, weight = after.outcome.layers[info.name].mask, after.finished.state[f"{info.path}.weight"]
            assert torch.all(weight[mask] == 0)
            assert bits is None or all(len(row.unique()) <= 16 for row in weight)
            is_changed = not torch.equal(weight, before.finished.state[f"{info.path}.weight"])
            changed += is_changed and info.peers is not None
        assert bits is not None or changed > NUM_EXPERTS, f"block {i}"
        assert after.refinement.after.judged < after.refinement.before.judged


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    "flags", [("--method", "sparsegpt"), ("--epochs", 1, "--refine-epochs", 1, "--bits", 4, "--distill-generated", 0)]
)
def test_a_run_gives_a_folder_that_transformers_opens(lampctl, tmp_path, words, family, flags):
    folder = save(tmp_path / "m", family, torch.bfloat16)
    goal = ("--sparsity", 0.5, "--calibration", f"text:{words}", "--run-dir", "r")
    answer = lampctl("run", folder, *goal, *flags, *AMOUNT)
    assert answer.code == 0, answer.err
    assert "experts received fewer tokens" in answer.out + answer.err
    run = tmp_path / "r"
    commits = [json.loads(path.read_text()) for path in sorted((run / "commits").iterdir())]
    experts = [commit["result"]["experts"] for commit in commits if commit["step"].startswith("prune-block")]
    assert {block["num_experts"] for block in experts if block} == {NUM_EXPERTS}
    assert all(0 < block["num_short"] <= NUM_EXPERTS and block["fewest"] >= 0 for block in experts if block)
    originals, found = exported_of(folder), exported(run)
    assert found.keys() == originals.keys()
    assert all(found[key].shape == tensor.shape for key, tensor in originals.items())
    num_masked = num_weights = 0
    for path in sorted((run / "model" / "masks").glob("*.safetensors")):
        for name, layer in read_mask_file(path).items():
            assert torch.all(layer.matrix_of(found[layer.key])[layer.mask] == 0), name
            num_masked, num_weights = num_masked + int(layer.mask.sum()), num_weights + layer.mask.numel()
    assert num_masked == round(0.5 * num_weights)
    model = open_model(resolve(str(run / "model")))
    prunable = [x for i in range(model.num_blocks) for x in model.layers(i) if x.role != "vital"]
    assert num_weights == sum(x.rows * x.cols for x in prunable)
    with torch.no_grad():
        ends = model.load_ends(torch.device("cpu"), "all")
        entry = ends.enter(IDS[:1])
        hidden = entry.hidden
        for index in range(model.num_blocks):
            hidden = model.run_block(model.load_block(index, hidden.device), hidden, entry.calls[index])
        own = loaded(run / "model")(IDS[:1], use_cache=False).logits
        torch.testing.assert_close(ends.leave(IDS[:1], hidden), own, rtol=0, atol=2e-6)


def exported_of(folder):
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", FEW)
def test_a_folder_with_experts_comes_back_from_its_packed_form(lampctl, tmp_path, words, family):
    folder = save(tmp_path / "m", family)
    assert lampctl("run", folder, "--sparsity", 0.5, "--method", "magnitude", "--run-dir", "r", *AMOUNT).code == 0
    packed = lampctl("export", "r", "--format", "packed", "--out", tmp_path / "m.packed")
    assert packed.code == 0, packed.err
    assert ("Packing gained" in packed.out) == (family == "gpt-oss")  # its files hold all experts of a block in one
    again = lampctl("export", "--unpack", tmp_path / "m.packed", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    for path in (tmp_path / "r" / "model").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "r" / "model")).read_bytes()


def test_a_setting_for_experts_is_refused_without_them(lampctl, tmp_path, words):
    folder = save_dense(tmp_path / "m", "llama")
    goal = ("--sparsity", 0.5, "--method", "wanda", "--calibration", f"text:{words}", "--run-dir", "r")
    answer = lampctl("run", folder, *goal, "--moe-calibrate-all-experts", *AMOUNT)
    assert answer.code == 2
    assert "--moe-calibrate-all-experts" in answer.err
    assert "no mixture of experts" in answer.err
    assert not (tmp_path / "r").exists()


def test_all_tokens_for_all_experts_is_part_of_a_runs_identity(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "mixtral")
    command = ("run", folder, "--sparsity", 0.5, "--method", "wanda", "--calibration", f"text:{words}", *AMOUNT)
    assert lampctl(*command, "--moe-calibrate-all-experts", "--run-dir", "r").code == 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["moe_calibrate_all_experts"] is True
    assert lampctl(*command, "--no-moe-calibrate-all-experts", "--run-dir", "r").code == 3
    assert lampctl(*command, "--run-dir", "routed").code == 0
    every, routed = exported(tmp_path / "r"), exported(tmp_path / "routed")
    key = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert not torch.equal(every[key], routed[key])
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(every[attention], routed[attention])


def test_a_budget_that_follows_the_data_counts_an_expert_without_a_token():
    model = build("gpt-oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[5] = -1000
    decoder = open_in_memory(model)
    context = context_of(decoder, inputs_of(IDS))
    hidden = ListStream(N, (T, decoder.hidden_size), torch.float32)
    capture(context, hidden, None)
    names = {layer.name for index in range(decoder.num_blocks) for layer in decoder.layers(index)}
    shares = outlier_shares(context, hidden, names, ListScratch())
    others = outlier_shares(context, hidden, {name for name in names if ".experts.5." not in name}, ListScratch())
    assert len(shares) == decoder.num_blocks
    assert 0 < shares[0] < 1
    assert shares[0] != others[0]


def test_a_block_with_experts_is_not_compiled(monkeypatch):
    """torch would compile it again for every number of tokens that an expert gets."""
    model = open_in_memory(build("mixtral"))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda block, **_: compiled.append(block) or block)
    device = replace(FP32, compiles=True)
    context_of(model, inputs_of(IDS), device).block(0).runner(model.load_block(0, torch.device("cpu")))
    assert not compiled
    dense = open_in_memory(build_dense("llama"))
    context_of(dense, inputs_of(IDS), device).block(0).runner(dense.load_block(0, torch.device("cpu")))
    assert len(compiled) == 1
