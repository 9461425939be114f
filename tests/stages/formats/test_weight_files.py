"""Which files of a folder are its weights: those that transformers would load."""

import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.errors import ResourceError
from stages.formats.checkpoint_files import INDEX, WeightFiles
from stages.models.convert import from_pickles
from tests.small_models import save

KEY = "model.norm.weight"


def write_shards(folder, tensors, *, left_out=(), stem="model-0000{}-of-00002.safetensors", index=INDEX, writer=None):
    """Two shards and their index."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        filename = stem.format(number)
        held = {name: tensors[name] for name in part if name not in left_out}
        (writer or save_file)(held, folder / filename, *([{"format": "pt"}] if writer is None else []))
        weight_map.update(dict.fromkeys(part, filename))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "m", "llama")


def older(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_a_single_file_wins_over_a_stale_index_as_in_transformers(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    write_shards(folder, older(tensors))
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with caplog.at_level(logging.WARNING):
        ours = WeightFiles(folder)
    assert torch.equal(ours.load(KEY), theirs[KEY])
    assert torch.equal(ours.load(KEY), tensors[KEY])
    assert "holds model.safetensors and, in model.safetensors.index.json, the names of other files" in caplog.text


def test_a_stale_index_whose_shards_are_gone_changes_nothing(folder, caplog):
    for filename in write_shards(folder, load_file(folder / "model.safetensors")).values():
        (folder / filename).unlink(missing_ok=True)
    assert KEY in WeightFiles(folder)
    assert "delete the one that is not meant" in caplog.text


def test_an_index_of_the_single_file_is_no_contradiction(folder, caplog):
    keys = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")}))
    assert KEY in WeightFiles(folder)
    assert caplog.text == ""


def test_the_file_that_config_json_names_is_used_as_in_transformers(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(older(tensors), folder / "other.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": "other.safetensors"}))
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(WeightFiles(folder).load(KEY), theirs[KEY])
    (folder / "other.safetensors").unlink()
    with pytest.raises(ResourceError, match=r"lacks other\.safetensors, which its config.json names"):
        WeightFiles(folder)


def test_a_tensor_that_its_shard_lacks_is_one_clear_error(folder, lampctl):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    filename = write_shards(folder, tensors, left_out=(KEY,))[KEY]
    answer = lampctl("run", "m", "--sparsity", "0.5", "--method", "magnitude", "--run-dir", "r")
    assert answer.code == 5
    assert f"says that {filename} holds {KEY}, but it does not" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_tensor_that_the_index_does_not_name_is_one_of_the_model(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][KEY]
    (folder / INDEX).write_text(json.dumps(index))
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(WeightFiles(folder).load(KEY), theirs.state_dict()[KEY])


def test_a_single_pickle_wins_over_stale_shards_of_pickles(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stale = {**older(tensors), "model.layers.9.gone.weight": torch.ones(1)}
    stem, index = "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"
    write_shards(folder, stale, stem=stem, index=index, writer=torch.save)
    torch.save(tensors, folder / "pytorch_model.bin")
    found = WeightFiles(from_pickles(folder))
    assert set(found.keys) == set(tensors)
    assert torch.equal(found.load(KEY), tensors[KEY])
    assert "delete the one that is not meant" in caplog.text
    (folder / "pytorch_model.bin").unlink()
    assert set(WeightFiles(from_pickles(folder)).keys) == set(stale)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_tensor_of_several_pieces_is_converted_as_torch_does(tmp_path, stored, dtype):
    tensor = torch.randn(1500, 1001).to(stored)
    save_file({"a": tensor, "count": torch.arange(5), "none": torch.zeros(0, 2)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    found = files.load("a", dtype)
    assert found.dtype == (dtype or stored)
    assert torch.equal(found, tensor.to(found.dtype))
    assert files.load("count", dtype).dtype == torch.int64
    assert files.load("none", dtype).shape == (0, 2)


def damaged_header(folder, change):
    """Change the header of the model's file, and nothing else."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header, len(data) - end)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[end:])


DAMAGE = {
    "a shape without its bytes": (
        lambda header, end: header.update(x={"dtype": "F32", "shape": [2**62], "data_offsets": [end, end]}),
        "x has 0 bytes",
    ),
    "a negative size": (
        lambda header, end: header.update(x={"dtype": "F32", "shape": [-1, 0], "data_offsets": [end, end]}),
        "x has 0 bytes",
    ),
    "two tensors in one place": (lambda header, end: header.update(x=dict(header[KEY])), "overlaps another tensor"),
    "no JSON object": (lambda header, end: header.update(x=1), "damaged header"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_header_is_a_damaged_file_before_any_work(folder, lampctl, case):
    change, says = DAMAGE[case]
    damaged_header(folder, change)
    answer = lampctl("run", folder, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "r")
    assert answer.code == 4, answer.err
    assert f"{folder}/model.safetensors is no safetensors file, or damaged" in answer.err
    assert says in answer.err
    assert not Path("r").exists()


@pytest.mark.parametrize("place", ["../elsewhere/{}", "{folder}/{}", "sub/../../elsewhere/{}"])
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, lampctl, place):
    write_shards(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: place.format(v, folder=folder) for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    answer = lampctl("run", folder, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "r")
    assert answer.code == 2, answer.err
    assert "lies outside its folder" in answer.err


def test_a_damaged_index_is_a_damaged_file(folder, lampctl):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / INDEX).write_text("{")
    answer = lampctl("run", folder, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "r")
    assert answer.code == 4, answer.err
    assert f"{INDEX} is damaged" in answer.err
