"""Experts of families whose classes have no common interface, against what transformers computes from its own."""

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import lampctl as api
from stages.formats.tensor_parts import gather, scatter
from stages.models.decoder import open_model
from stages.models.experts import every_token_to_every_expert
from stages.models.in_memory import open_in_memory
from stages.models.resolve import resolve
from tests.census.journey import chain_logits
from tests.small_models import VOCAB

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

CPU = torch.device("cpu")
IDS = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
NUM_EXPERTS, TOP_K = 4, 2
WHERE = {"llama4": "feed_forward.experts", "dbrx": "ffn.experts"}


def configuration(family):
    if family == "llama4":
        sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        experts = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "interleave_moe_layer_step": 2}
        return tf.Llama4TextConfig(vocab_size=VOCAB, max_position_embeddings=128, **sizes, **heads, **experts)
    experts = {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    return tf.DbrxConfig(
        vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, attn_config=attention, ffn_config=experts, max_seq_len=128
    )


def build(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(configuration(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def matrices(experts, family, number):
    """Gate, up and down projection of one expert in transformers' module."""
    if family == "llama4":
        gate, up = experts.gate_up_proj[number].T.chunk(2)
        return gate, up, experts.down_proj[number].T
    stacks = (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)
    gate, up, down = (stack.view(NUM_EXPERTS, 24, 32)[number] for stack in stacks)
    return gate, up, down.T


@pytest.fixture(scope="module", params=sorted(WHERE))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@pytest.fixture(scope="module")
def folder(family, model, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    model.save_pretrained(path)
    return path


def test_the_blocks_compute_what_the_model_computes(model, folder):
    with torch.no_grad():
        own = model(IDS, use_cache=False).logits
    assert own.abs().max() > 1
    for decoder in (open_model(resolve(str(folder))), open_in_memory(model)):
        torch.testing.assert_close(chain_logits(decoder, IDS), own, rtol=1e-5, atol=1e-5)


def test_every_expert_has_three_layers_with_the_matrices_of_the_model(family, model, folder):
    decoder = open_model(resolve(str(folder)))
    layers = {layer.path: layer for layer in decoder.layers(1)}
    block = decoder.load_block(1, CPU)
    experts = model.get_submodule(decoder.blocks_path)[1].get_submodule(WHERE[family])
    for number in range(NUM_EXPERTS):
        wanted = dict(zip(("gate", "up", "down"), matrices(experts, family, number), strict=True))
        for name, matrix in wanted.items():
            layer = layers.pop(f"{WHERE[family]}.{number}.{name}_proj")
            assert torch.equal(block.get_submodule(layer.path).weight, matrix), layer.path
            assert (layer.rows, layer.cols) == tuple(matrix.shape)
            assert layer.peers == f"{WHERE[family]}.*.{name}_proj"
            assert layer.token_share == TOP_K / NUM_EXPERTS
    assert all(layer.peers is None for layer in layers.values())
    assert [path for path, layer in layers.items() if layer.role == "vital"] == [
        "feed_forward.router" if family == "llama4" else "ffn.router.layer"
    ]


def test_the_stored_tensors_of_a_block_come_back_from_its_state(folder):
    decoder = open_model(resolve(str(folder)))
    stored = load_file(folder / "model.safetensors")
    for index in range(decoder.num_blocks):
        parts = decoder.stored_parts(index)
        again = scatter(parts, gather(parts, stored.__getitem__))
        assert again.keys() == {key for key in stored if key.startswith(f"{decoder.blocks_path}.{index}.")}
        for key, tensor in again.items():
            assert torch.equal(tensor, stored[key]), key


def test_the_gradients_are_those_of_the_model(family, model, folder):
    decoder = open_model(resolve(str(folder)))
    theirs = model.get_submodule(decoder.blocks_path)[1]
    ours = decoder.load_block(1, CPU).requires_grad_(True)
    entry = decoder.load_ends(CPU, "enter").enter(IDS)
    probe = torch.randn(entry.hidden.shape, generator=torch.Generator().manual_seed(2))
    for block in (ours, theirs):
        block.zero_grad()
        (decoder.run_block(block, entry.hidden, entry.calls[1]) * probe).sum().backward()
    router = "feed_forward.router" if family == "llama4" else "ffn.router.layer"
    wanted = theirs.get_submodule(router).weight.grad
    torch.testing.assert_close(ours.get_submodule(router).weight.grad, wanted, rtol=1e-4, atol=1e-4)
    own = theirs.get_submodule(WHERE[family])
    gradients = copy.deepcopy(own)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            gradients.get_parameter(name).copy_(parameter.grad)
    for number in range(NUM_EXPERTS):
        expert = ours.get_submodule(f"{WHERE[family]}.{number}")
        layers = (expert.gate_proj, expert.up_proj, expert.down_proj)
        for layer, matrix in zip(layers, matrices(gradients, family, number), strict=True):
            torch.testing.assert_close(layer.weight.grad, matrix.detach(), rtol=1e-4, atol=1e-4)


def test_statistics_on_every_token_leave_the_output_as_it_is(family, model):
    decoder = open_in_memory(model)
    entry = decoder.load_ends(CPU, "enter").enter(IDS)
    block = decoder.load_block(1, CPU)
    counts = []
    layers = [block.get_submodule(f"{WHERE[family]}.{number}.up_proj") for number in range(NUM_EXPERTS)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    plain = decoder.run_block(block, entry.hidden, entry.calls[1])
    assert sum(counts) == TOP_K * IDS.numel()
    counts.clear()
    with every_token_to_every_expert(block, is_on=True):
        every = decoder.run_block(block, entry.hidden, entry.calls[1])
    torch.testing.assert_close(every, plain, rtol=1e-5, atol=1e-5)
    assert counts == [IDS.numel()] * NUM_EXPERTS


@pytest.mark.filterwarnings("ignore:.*experts received fewer tokens")
def test_a_model_in_memory_is_pruned_in_its_own_parameters(family):
    result = api.prune(build(family), IDS, method="sparsegpt", sparsity=0.5)
    block = result.model.get_submodule(open_in_memory(result.model).blocks_path)[1]
    experts = block.get_submodule(WHERE[family])
    for number in range(NUM_EXPERTS):
        for matrix in matrices(experts, family, number):
            assert (matrix == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert result.report.sparsity == 0.5
