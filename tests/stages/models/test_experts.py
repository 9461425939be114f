"""Experts as layers of their own: the block computes what transformers computes, and every matrix has its place."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lampctl as api
from stages.errors import UsageError
from stages.formats.tensor_parts import gather, scatter
from stages.models.decoder import open_model
from stages.models.experts import every_token_to_every_expert, only_experts
from stages.models.in_memory import open_in_memory
from stages.models.resolve import resolve
from tests.small_experts import FAMILIES, NUM_EXPERTS, TOP_K, build, loaded, save
from tests.small_models import VOCAB

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

CPU = torch.device("cpu")
IDS = torch.randint(4, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {family: save(root / family, family) for family in FAMILIES}


@torch.no_grad()
def logits_of(model):
    ends = model.load_ends(CPU, "all")
    entry = ends.enter(IDS)
    hidden = entry.hidden
    for index in range(model.num_blocks):
        hidden = model.run_block(model.load_block(index, CPU), hidden, entry.calls[index])
    return ends.leave(IDS, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gives_what_the_model_gives(folders, family):
    with torch.no_grad():
        own = loaded(folders[family])(IDS, use_cache=False).logits
    torch.testing.assert_close(logits_of(open_model(resolve(str(folders[family])))), own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_memory_gives_the_same(folders, family):
    model = loaded(folders[family])
    with torch.no_grad():
        own = model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits_of(open_in_memory(model)), own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_has_three_layers_and_routers_are_no_layers(folders, family):
    model = open_model(resolve(str(folders[family])))
    layers = model.layers(2)
    experts = [layer for layer in layers if layer.peers is not None]
    assert len(experts) == 3 * NUM_EXPERTS
    assert {layer.token_share for layer in experts} == {TOP_K / NUM_EXPERTS}
    assert {layer.peers for layer in experts} == {f"mlp.experts.*.{m}_proj" for m in ("gate", "up", "down")}
    assert {layer.role for layer in experts} == {"gate", "up", "fc2"}
    others = {layer.path for layer in layers if layer.peers is None}
    routers = {path for path in others if path.endswith(("gate", "router"))}
    assert routers == ({"mlp.shared_expert_gate"} if family == "qwen2-moe" else set())
    assert all(layer.role == "vital" for layer in layers if layer.path in routers)
    assert all(layer.token_share == 1 for layer in layers if layer.peers is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_is_where_the_files_have_it(folders, family):
    """Against transformers' own 3-D parameters, by the rule that the family's forward states."""
    own = loaded(folders[family]).model.layers[2].mlp.experts
    block = open_model(resolve(str(folders[family]))).load_block(2, CPU)
    for number in range(NUM_EXPERTS):
        expert = block.get_submodule(f"mlp.experts.{number}")
        if family == "gpt-oss":
            gate, up = own.gate_up_proj[number, :, ::2].T, own.gate_up_proj[number, :, 1::2].T
            down = own.down_proj[number].T
            assert torch.equal(expert.gate_proj.bias, own.gate_up_proj_bias[number, ::2])
            assert torch.equal(expert.up_proj.bias, own.gate_up_proj_bias[number, 1::2])
            assert torch.equal(expert.down_proj.bias, own.down_proj_bias[number])
        else:
            gate, up = own.gate_up_proj[number].chunk(2)
            down = own.down_proj[number]
        assert torch.equal(expert.gate_proj.weight, gate)
        assert torch.equal(expert.up_proj.weight, up)
        assert torch.equal(expert.down_proj.weight, down)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_tensors_of_a_block_come_back_from_its_state(folders, family):
    model = open_model(resolve(str(folders[family])))
    stored = load_file(folders[family] / "model.safetensors")
    for index in range(model.num_blocks):
        parts = model.stored_parts(index)
        again = scatter(parts, gather(parts, stored.__getitem__))
        assert again.keys() == {key for key in stored if f".layers.{index}." in key}
        for key, tensor in again.items():
            assert torch.equal(tensor, stored[key]), key


def test_a_checkpoint_with_one_tensor_for_all_experts_is_read_too(folders, tmp_path):
    model = loaded(folders["qwen3-moe"])
    model.save_pretrained(tmp_path, save_original_format=False)
    decoder = open_model(resolve(str(tmp_path)))
    assert decoder.stored_names(0)["mlp.experts.3.up_proj.weight"] == "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(logits_of(decoder), logits_of(open_model(resolve(str(folders["qwen3-moe"])))))


def test_a_missing_expert_is_named(folders, tmp_path):
    tensors = load_file(folders["olmoe"] / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folders["olmoe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        open_model(resolve(str(tmp_path)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_a_pass_does_not_need_are_not_computed(family):
    decoder = open_in_memory(build(family))
    entry = decoder.load_ends(CPU, "enter").enter(IDS)
    index = decoder.num_blocks - 1
    block, calls = decoder.load_block(index, CPU), []
    layers = [info for info in decoder.layers(index) if info.expert is not None]
    for info in layers:
        record = lambda _, args, path=info.path: calls.append((path, args[0]))  # noqa: E731
        block.get_submodule(info.path).register_forward_pre_hook(record)

    def run():
        calls.clear()
        return decoder.run_block(block, entry.hidden, entry.calls[index]), list(calls)

    output, all_calls = run()
    wanted = sorted({info.expert for info in layers if info.path in dict(all_calls)})[1:3]
    with only_experts(block, wanted):
        _, few_calls = run()
    expected = [(path, x) for path, x in all_calls if path.rpartition(".")[0] in wanted]
    assert [path for path, _ in few_calls] == [path for path, _ in expected]
    assert len(few_calls) == 6 < len(all_calls)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(few_calls, expected, strict=True))
    with only_experts(block, None):
        again, calls_again = run()
    assert torch.equal(again, output)
    assert len(calls_again) == len(all_calls)


def test_statistics_on_every_token_leave_the_output_as_it_is():
    model = open_in_memory(build("gpt-oss"))
    entry = model.load_ends(CPU, "enter").enter(IDS)
    block = model.load_block(0, CPU)
    plain = model.run_block(block, entry.hidden, entry.calls[0])
    counts = []
    block.get_submodule("mlp.experts.3.up_proj").register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    with every_token_to_every_expert(block, is_on=True):
        every = model.run_block(block, entry.hidden, entry.calls[0])
    torch.testing.assert_close(every, plain, rtol=0, atol=1e-6)
    assert counts == [24]
    assert torch.equal(model.run_block(block, entry.hidden, entry.calls[0]), plain)
    assert len(counts) == 1 or counts[1] < 24


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.filterwarnings("ignore:.*experts received fewer tokens")
def test_a_model_in_memory_is_pruned_in_its_own_parameters(family):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = api.prune(model, IDS.reshape(2, 12), method="sparsegpt", sparsity=0.5)
    experts = result.model.model.layers[1].mlp.experts
    for parameter in (experts.gate_up_proj, experts.down_proj):
        assert (parameter == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert result.report.sparsity == 0.5
    router = "router" if family == "gpt-oss" else "gate"
    key = f"model.layers.1.mlp.{router}.weight"
    assert torch.equal(result.model.state_dict()[key], before[key])
