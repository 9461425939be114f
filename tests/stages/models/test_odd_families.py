"""Families whose blocks hand on more than a hidden state, and models that are refused before a weight is read."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.errors import UsageError
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.testing.models import check_model_family
from tests.census.families import CENSUS
from tests.small_models import tokenizer

pytestmark = pytest.mark.long

ENTRIES = {entry.name: entry for entry in CENSUS}


def saved(name, folder):
    ENTRIES[name].model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return resolve(str(folder))


@pytest.mark.parametrize(
    "name", ["gemma4_text", "gemma3n_text", "gemma4_unified_text", "deepseek_v4", "qwen4_exp_text", "bamba"]
)
def test_all_that_blocks_hand_on_travels_in_the_stream(name, tmp_path):
    folder = saved(name, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    ids = torch.randint(4, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    check_model_family("decoder", folder, ids, lambda inputs: whole(inputs, use_cache=False).logits)


@pytest.mark.parametrize(("name", "width"), [("gemma4_text", 32 + 32 + 64), ("gemma3n_text", 2 * 32 + 32 + 32)])
def test_a_stream_is_as_wide_as_the_hidden_states_and_the_shared_keys_and_values(name, width, tmp_path):
    """Of two heads of 8 (global attention of Gemma 4: 16), twice."""
    model = open_model(saved(name, tmp_path))
    assert model.hidden_size == width
    assert model.hidden_shape((24,)) == (24, width)


def test_keys_and_values_of_the_biased_stream_reach_the_blocks_that_share_them(tmp_path):
    model = open_model(saved("gemma4_text", tmp_path))
    ids = torch.arange(4, 28)[None]
    with torch.no_grad():
        entry = model.load_ends(torch.device("cpu"), "all").enter(ids)
        hidden = entry.hidden
        for index in range(4):
            hidden = model.run_block(model.load_block(index, torch.device("cpu")), hidden, entry.calls[index])
        block = model.load_block(4, torch.device("cpu"))
        other = hidden.clone()
        other[..., 32:] = 0
        whole, without = (model.run_block(block, h, entry.calls[4])[..., :32] for h in (hidden, other))
    assert not torch.allclose(whole, without)


@pytest.mark.parametrize("rescale_every", [0, 2])
def test_rwkv_is_the_same_model_whether_its_loop_rescales_or_not(rescale_every, tmp_path):
    config = ENTRIES["rwkv"].config()
    config.rescale_every = rescale_every
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    folder = resolve(str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    model, ids = open_model(folder), torch.arange(4, 28)[None]
    with torch.no_grad():
        ends = model.load_ends(torch.device("cpu"), "all")
        entry = ends.enter(ids)
        hidden = entry.hidden
        for index in range(model.num_blocks):
            hidden = model.run_block(model.load_block(index, torch.device("cpu")), hidden, entry.calls[index])
        torch.testing.assert_close(ends.leave(ids, hidden), whole(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "each token sees those after it: this is an encoder"),
        ("electra", "each token sees those after it: this is an encoder"),
        ("xlm", "changes the hidden state between block 0 and block 1"),
        ("dory", r"calls its blocks in the order \[0, 1, 2, 0\], not each of them once"),
        ("zamba2", r"layers\.1\.shared_transformer\.\S+ and model\.layers\.3\.shared_transformer\.\S+ are one weight"),
        ("zaya", "block 1 of a ZayaForCausalLM reads what an earlier block returned beside its hidden state"),
        ("trocr", r"encoder_attn\.k_proj of a TrOCRForCausalLM reads the output of an encoder"),
        ("cpmant", r"a hidden state of an unknown shape \(1, 36, 32\)"),
        ("bart", "no decoder-only language model"),
    ],
)
def test_a_model_that_cannot_be_pruned_block_by_block_is_refused_by_name(name, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        open_model(saved(name, tmp_path))


def test_a_bert_that_is_a_decoder_is_none_of_the_encoders(tmp_path):
    config = ENTRIES["bert"].config()
    config.is_decoder = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert open_model(resolve(str(tmp_path))).num_blocks == 3


def test_a_bug_in_the_probe_is_not_called_the_fault_of_the_model(tmp_path, monkeypatch):
    folder = saved("gpt2", tmp_path)

    def broken(*_):
        raise AttributeError("ours")

    monkeypatch.setattr("stages.models.probe._Probe._hidden_layout", broken)
    with pytest.raises(AttributeError, match="ours"):
        open_model(folder)


def test_a_block_that_fails_is_the_fault_of_the_model(tmp_path, monkeypatch):
    folder = saved("gpt2", tmp_path)

    def broken(*_, **__):
        raise AttributeError("theirs")

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2Block.forward", broken)
    with pytest.raises(UsageError, match=r"GPT2LMHeadModel cannot be run one by one \(AttributeError: theirs"):
        open_model(folder)
