"""Blocks run one by one give what the model's own forward gives, to the last bit, in every family."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, JetMoeConfig

from stages.errors import UsageError
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from tests.small_models import FAMILIES, VOCAB, build, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: save(root / family, family) for family in FAMILIES}


def block_by_block(model, ids):
    with torch.no_grad():
        ends = model.load_ends(CPU, "all")
        entry = ends.enter(ids)
        hidden, states = entry.hidden, []
        for index in range(model.num_blocks):
            block = model.load_block(index, CPU)
            hidden = model.run_block(block, hidden, entry.calls[index])
            states.append(hidden)
        return states, ends.leave(ids, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_models_own_forward_bit_for_bit(folders, family):
    reference = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    model = open_model(resolve(str(folders[family])))
    ids = torch.randint(4, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    states, logits = block_by_block(model, ids)
    with torch.no_grad():
        own = reference(ids, use_cache=False).logits
    assert torch.equal(logits, own)
    assert states[0].shape == (1, 24, model.hidden_size)
    # The last block's output matters: another hidden state gives other logits.
    with torch.no_grad():
        assert not torch.equal(model.load_ends(CPU).leave(ids, states[0]), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_block_is_found_with_a_role(folders, family):
    model = open_model(resolve(str(folders[family])))
    state = {k: v.shape for k, v in load_file(folders[family] / "model.safetensors").items()}
    roles = {layer.role for layer in model.layers(0)}
    assert None not in roles
    assert roles >= {"fc2", "out"}
    assert roles >= {"qkv"} or roles >= {"q", "k", "v"}
    names = model.stored_names(0)
    for layer in model.layers(0):
        shape = state[names[layer.path + ".weight"]]
        assert tuple(shape) == ((layer.cols, layer.rows) if layer.transposed else (layer.rows, layer.cols))
    matrices = {key for key, name in names.items() if len(state[name]) == 2}
    assert matrices == {layer.path + ".weight" for layer in model.layers(0)}


def test_tokens_that_enter_do_not_need_an_untied_head(folders):
    model = open_model(resolve(str(folders["llama"])))
    ends = model.load_ends(CPU, "enter")
    assert ends._model.lm_head.weight.is_meta
    assert not model.load_ends(CPU, "leave")._model.lm_head.weight.is_meta


def test_names_of_other_versions_and_without_the_base_prefix_are_found(folders, tmp_path):
    for family, rename in (
        ("opt", lambda k: k.removeprefix("model.")),  # as facebook/opt-* store them
        ("gpt2", lambda k: k.removeprefix("transformer.")),
        ("gpt-neox", lambda k: k.replace("lm_head.", "embed_out.")),
    ):
        folder = tmp_path / family
        shutil.copytree(folders[family], folder)
        tensors = load_file(folder / "model.safetensors")
        renamed = {rename(k): v for k, v in tensors.items()}
        assert renamed.keys() != tensors.keys() or family == "gpt-neox"
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        ids = torch.arange(4, 20)[None]
        _, mine = block_by_block(open_model(resolve(str(folder))), ids)
        _, plain = block_by_block(open_model(resolve(str(folders[family]))), ids)
        assert torch.equal(mine, plain), family


def test_half_precision_weights_are_computed_in_fp32(tmp_path):
    folder = save(tmp_path / "half", "llama", dtype=torch.bfloat16)
    model = open_model(resolve(str(folder)))
    assert set(model.original_dtypes(1).values()) == {torch.bfloat16}
    block = model.load_block(1, CPU)
    assert {p.dtype for p in block.parameters()} == {torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(block.self_attn.q_proj.weight, whole.model.layers[1].self_attn.q_proj.weight)


def test_weights_are_copies_in_aligned_memory(folders):
    block = open_model(resolve(str(folders["llama"]))).load_block(0, CPU)
    assert all(p.data_ptr() % 64 == 0 for p in block.parameters())


def test_missing_and_misshapen_weights_are_refused_by_name(folders, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(resolve(str(folder)))
    tensors["model.layers.1.mlp.up_proj.weight"] = gone[:5].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"\(5, 32\)"):
        open_model(resolve(str(folder)))


def test_experts_that_are_not_layers_are_refused_whole(tmp_path):
    config = JetMoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    held = r"mlp\.input_linear\.weight, \(4, 128, 32\) in a JetMoeParallelExperts"
    with pytest.raises(UsageError, match=rf"only \d+% of the matrix weights of block 0 .* does not: {held}\)"):
        open_model(resolve(str(tmp_path / "moe")))


def test_blocks_without_a_linear_layer_are_refused_by_name(folders, monkeypatch):
    monkeypatch.setattr("stages.models.decoder.prunable_layers", lambda block, prefix, config: ())
    with pytest.raises(UsageError, match=r"only 0% of the matrix weights of block 0 lie in linear layers"):
        open_model(resolve(str(folders["llama"])))


def test_what_is_no_language_model_is_refused(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="no decoder-only language model"):
        open_model(resolve(str(folder)))


def test_a_pickle_is_converted_once_into_the_cache(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pickle"
    shutil.copytree(folders["llama-gqa"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied tensors share memory in pickles
    torch.save(tensors, folder / "pytorch_model.bin")
    converted = resolve(str(folder))
    assert converted.path.is_relative_to(tmp_path / "cache")
    assert resolve(str(folder)).path == converted.path
    _, mine = block_by_block(open_model(converted), torch.arange(4, 20)[None])
    _, plain = block_by_block(open_model(resolve(str(folders["llama-gqa"]))), torch.arange(4, 20)[None])
    assert torch.equal(mine, plain)


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_with_code_in_it_is_not_executed(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pickle"
    folder.mkdir()
    shutil.copy(folders["llama"] / "config.json", folder)
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="cannot be read as a pickle of plain tensors"):
        resolve(str(folder))
    assert "executed" not in capsys.readouterr().out
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_blocks_that_return_tuples_and_blocks_that_return_tensors_both_occur():
    """Otherwise the two branches of the recorders would not be tested at all."""
    seen = set()
    for family in FAMILIES:
        model = build(family)
        captured = []
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == 3:
                module[0].register_forward_hook(lambda m, a, o, c=captured: c.append(isinstance(o, tuple)))
                break
        model(torch.arange(4, 12)[None], use_cache=False)
        seen.add(captured[0])
    assert seen == {True, False}
