"""A model in memory gives the blocks, inputs and names that its folder gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stages.errors import UsageError
from stages.models.architecture import without_weights
from stages.models.decoder import open_model
from stages.models.in_memory import open_in_memory
from stages.models.resolve import resolve
from tests.small_models import FAMILIES, build, save

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_calls_and_ends_equal_those_of_the_folder(family, tmp_path):
    folder = open_model(resolve(str(save(tmp_path / "model", family))))
    memory = open_in_memory(build(family))
    tokens = torch.arange(24).view(2, 12) + 5
    first, second = folder.load_ends(CPU).enter(tokens), memory.load_ends(CPU).enter(tokens)
    assert torch.equal(first.hidden, second.hidden)
    for index in range(folder.num_blocks):
        assert memory.layers(index) == folder.layers(index)
        ours, theirs = memory.load_block(index, CPU), folder.load_block(index, CPU)
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
        hidden = memory.run_block(ours, first.hidden, second.calls[index])
        assert torch.equal(hidden, folder.run_block(theirs, first.hidden, first.calls[index]))


def test_the_model_keeps_its_weights_when_a_block_changes():
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = open_in_memory(model).load_block(0, CPU)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_weights_keep_their_dtype_as_the_one_of_the_export():
    decoder = open_in_memory(build("llama").to(torch.bfloat16))
    assert set(decoder.original_dtypes(0).values()) == {torch.bfloat16}
    assert decoder.load_block(0, CPU).state_dict()["self_attn.q_proj.weight"].dtype == torch.float32


def test_what_is_no_decoder_in_memory_is_refused():
    import transformers as tf

    with pytest.raises(UsageError, match="not a model of transformers"):
        open_in_memory(torch.nn.Linear(2, 2))
    encoder = tf.BertModel(
        tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(UsageError, match="not a decoder-only language model"):
        open_in_memory(encoder)
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(build("llama").config)
    with pytest.raises(UsageError, match="meta device"):
        open_in_memory(empty)


def test_only_models_of_the_same_thread_are_built_on_meta():
    with ThreadPoolExecutor(1) as other, without_weights():
        assert torch.nn.Linear(2, 2).weight.is_meta
        assert not other.submit(lambda: torch.nn.Linear(2, 2).weight.is_meta).result()
    assert not torch.nn.Linear(2, 2).weight.is_meta
