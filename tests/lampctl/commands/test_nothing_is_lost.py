"""What is exported is the whole checkpoint: every tensor under its own name, every small file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.rundir.run_directory import RunDirectory
from stages.formats.checkpoint_files import WeightFiles
from stages.model_card import CardFacts, model_card
from stages.models.companion_files import LARGEST_BYTES, companion_files, companions
from stages.models.source_card import SourceCard, source_card
from tests import small_sam
from tests.small_models import save

FLAGS = ("--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--device", "cpu", "--run-dir", "r")


def exported(folder: Path = Path("r/model")) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: files.load(name) for name in files.keys}


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put tensors into a model's file; all that is in it then."""
    whole = {**load_file(folder / "model.safetensors"), **tensors}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return whole


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(torch.uint8), right.view(torch.uint8))


EXTRA = {
    "mtp.fc.weight": torch.randn(4, 4).bfloat16(),
    "model.layers.3.self_attn.q_proj.weight": torch.randn(32, 32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(4),
    "extra.codes": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "extra.counts": torch.arange(3).to(torch.uint32),
    "extra.double": torch.randn(2, dtype=torch.float64),
}


def test_tensors_that_no_block_claims_go_along_unchanged_and_are_told_once(lampctl, tmp_path):
    source = add_tensors(save(tmp_path / "m", "llama", torch.bfloat16), EXTRA)
    answer = lampctl("run", "m", *FLAGS)
    assert answer.code == 0, answer.err
    assert answer.err.count("exported unpruned and unchanged") == 1
    assert "mtp.fc.* (1)" in answer.err
    found = exported()
    assert found.keys() == source.keys()
    changed = {name for name in source if not same(source[name], found[name])}
    assert changed == {
        n for n in source if n.startswith("model.layers.") and n.endswith("proj.weight") and ".3." not in n
    }
    _, info = AutoModelForCausalLM.from_pretrained("r/model", output_loading_info=True)
    _, original = AutoModelForCausalLM.from_pretrained("m", output_loading_info=True)
    assert info == original


def test_a_cast_changes_floating_point_numbers_and_no_codes(lampctl, tmp_path):
    source = add_tensors(save(tmp_path / "m", "llama"), EXTRA)
    assert lampctl("run", "m", *FLAGS, "--export-dtype", "float16").code == 0
    found = exported()
    assert found.keys() == source.keys()
    for name in ("mtp.fc.weight", "extra.double", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert same(found[name], source[name].half()), name
    for name in ("extra.codes", "extra.counts"):
        assert same(found[name], source[name]), name


def test_both_names_of_a_tied_weight_are_kept(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama-gqa")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    source = add_tensors(folder, {"lm_head.weight": embedding.clone()})
    assert lampctl("run", "m", *FLAGS).code == 0
    assert exported().keys() == source.keys()


def test_an_ordinary_model_gives_no_notice_and_opens_whole(lampctl, tmp_path):
    save(tmp_path / "m", "opt")
    answer = lampctl("run", "m", *FLAGS)
    assert "exported unpruned" not in answer.err
    assert exported().keys() == load_file("m/model.safetensors").keys()
    _, info = AutoModelForCausalLM.from_pretrained("r/model", output_loading_info=True)
    assert not any(info.values())


def test_shards_have_the_names_that_other_tools_look_for(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    assert lampctl("run", "m", *FLAGS).code == 0
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(path.name for path in Path("r/model").glob("*.safetensors")) == names
    index = json.loads(Path("r/model/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    run = RunDirectory.open(Path("r"))
    for block in range(3):
        assert Path(f"r/model/{names[block]}").samefile(run.open_file(f"pruned/{block}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names, _: names[1:], "the export lacks 1 tensors"),
        (lambda names, _: (*names, names[0]), None),
    ],
)
def test_a_lost_tensor_stops_the_export(lampctl, tmp_path, monkeypatch, change, message):
    from stages import export

    save(tmp_path / "m", "llama")
    names = export.outside_names
    monkeypatch.setattr(export, "outside_names", lambda model: change(names(model), model))
    answer = lampctl("run", "m", *FLAGS)
    if message is None:
        assert answer.code == 0, answer.err
    else:
        assert answer.code == 1
        assert message in answer.err


def test_a_tensor_that_changes_on_the_way_stops_the_export(lampctl, tmp_path, monkeypatch):
    from stages import export

    save(tmp_path / "m", "llama")
    written = export.shard_bytes
    monkeypatch.setattr(export, "shard_bytes", lambda tensors: written({n: t + 1 for n, t in tensors.items()}))
    answer = lampctl("run", "m", *FLAGS)
    assert answer.code == 1
    assert "its exported copy differs" in answer.err


def test_a_norm_that_a_pruner_changed_stops_the_export(lampctl, tmp_path, monkeypatch):
    from stages import export

    save(tmp_path / "m", "llama")
    written = export.block_shard

    def changed(model, block, state):
        return written(model, block, {n: t + 1 if "layernorm" in n else t for n, t in state.items()})

    monkeypatch.setattr(export, "block_shard", changed)
    answer = lampctl("run", "m", *FLAGS)
    assert answer.code == 1
    assert "layernorm.weight was not changed by any step" in answer.err


SMALL = {
    "tekken.json": "{}",
    "spiece.model": "s",
    "sentencepiece.bpe.model": "b",
    "qwen.tiktoken": "t",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "free",
    "NOTICE.md": "n",
    "modeling_mine.py": "x = 1\n",
}
OTHER = {
    "README.md": "the source's card",
    "flax_model.msgpack": "w",
    "tf_model.h5": "w",
    "model.onnx": "w",
    "optimizer.pt": "w",
    "pytorch_model.bin.index.json": "{}",
    "onnx/model.onnx": "w",
    "onnx/config.json": "{}",
    ".git/config": "g",
    ".cache/huggingface/x.json": "{}",
    "__pycache__/a.json": "p",
    ".gitattributes": "a",
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_every_small_file_goes_along_and_no_other(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    put(folder, SMALL | OTHER)
    assert lampctl("run", "m", *FLAGS).code == 0
    for name, text in SMALL.items():
        assert (Path("r/model") / name).read_text() == text, name
    for name in OTHER.keys() - {"README.md"}:
        assert not (Path("r/model") / name).exists(), name


CARD = """---
license: other
license_name: mine
license_link: LICENSE
language: [en, no]
base_model: me/base
tags: [chat, pruning]
pipeline_tag: text-generation
model-index: [{name: m, results: []}]
---
# M
What M is.
"""


def front_matter(folder="r/model"):
    return yaml.safe_load(Path(folder, "README.md").read_text().split("---\n")[1])


def test_the_card_of_the_source_goes_along_and_its_licence_holds(lampctl, tmp_path):
    put(save(tmp_path / "m", "llama"), {"README.md": CARD})
    assert lampctl("run", "m", *FLAGS).code == 0
    assert Path("r/model/ORIGINAL_README.md").read_text() == CARD
    assert front_matter() == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "base_model": "me/base",
        "tags": ["chat", "pruning", "sparsity", "lampctl"],
        "pipeline_tag": "text-generation",
    }
    card = Path("r/model/README.md").read_text()
    assert "[ORIGINAL_README.md]" in card
    # The pruned model is a source, too: each card is kept.
    assert lampctl("run", "r/model", *FLAGS[:-1], "again").code == 0
    assert Path("again/model/ORIGINAL_README.md").read_text() == CARD
    assert Path("again/model/ORIGINAL_README_2.md").read_text() == card
    assert front_matter("again/model") == front_matter()


@pytest.mark.parametrize("card", ["no front matter", "---\n- a\n---\n", "---\na: [\n---\n"])
def test_a_card_without_readable_front_matter_goes_along(tmp_path, caplog, card):
    (tmp_path / "ORIGINAL_README.md").write_text(card)
    assert source_card(tmp_path) == SourceCard("ORIGINAL_README.md", {})
    assert ("no YAML" in caplog.text) == card.startswith("---")


def test_a_model_of_the_hub_is_the_base_model_of_the_pruned_one():
    card = SourceCard("ORIGINAL_README.md", {"base_model": "me/base", "license": "mit", "tags": "chat"})
    place = ("language", "AutoModelForCausalLM", "me/it", True, None)
    facts = CardFacts(*place, "wanda", "50%", 1, 2, 0, False, {}, (), (), "1", card)
    found = yaml.safe_load(model_card(facts).decode().split("---\n")[1])
    assert (found["base_model"], found["license"], found["tags"][0]) == ("me/it", "mit", "chat")


def test_small_files_beside_pickles_go_along(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    put(folder, SMALL)
    assert lampctl("run", "m", *FLAGS).code == 0
    for name, text in SMALL.items():
        assert (Path("r/model") / name).read_text() == text, name


def test_small_files_of_segment_anything_go_along(lampctl, tmp_path):
    folder = small_sam.save(tmp_path / "m")
    put(folder, {"LICENSE": "free", "preprocessor_config.json": '{"mine": 1}'})
    assert lampctl("run", "m", *FLAGS).code == 0
    assert Path("r/model/LICENSE").read_text() == "free"
    assert json.loads(Path("r/model/preprocessor_config.json").read_text()) == {"mine": 1}
    assert exported().keys() == load_file(folder / "model.safetensors").keys()


def test_a_run_inside_the_model_folder_is_not_copied_into_itself(lampctl, tmp_path, monkeypatch):
    folder = save(tmp_path / "m", "llama")
    monkeypatch.chdir(folder)
    assert lampctl("run", ".", *FLAGS).code == 0
    assert not Path("r/model/r").exists()
    assert companions(["a/b/c.json", "a/d/e.safetensors", "f/g.json"]) == ["f/g.json"]


def test_config_json_names_the_dtype_everywhere_and_no_other_file(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    settings |= {"transformers_weights": "mine.safetensors", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert lampctl("run", "m", *FLAGS, "--export-dtype", "bfloat16").code == 0
    found = json.loads(Path("r/model/config.json").read_text())
    assert found["dtype"] == "bfloat16"
    assert not {"torch_dtype", "transformers_weights"} & found.keys()
    model, info = AutoModelForCausalLM.from_pretrained("r/model", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info.values())


def test_folders_with_the_names_of_older_versions_open(lampctl, tmp_path, words):
    save(tmp_path / "m", "llama")
    assert lampctl("run", "m", *FLAGS).code == 0
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    before = [*(f"block-{block:05d}.safetensors" for block in range(3)), "outside-00000.safetensors"]
    old = tmp_path / "old"
    shutil.copytree("r/model", old)
    for name, older in zip(names, before, strict=True):
        (old / name).rename(old / older)
    index = old / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    renamed = {key: before[names.index(name)] for key, name in weight_map.items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": renamed}))
    assert exported(old).keys() == exported().keys()
    figures = [
        lampctl("evaluate", folder, "--evaluate", "text:words.txt", "--eval-seqlen", "32", "--json").json
        for folder in ("old", "r/model")
    ]
    assert figures[0].pop("model") != figures[1].pop("model")
    assert figures[0] == figures[1]
    assert lampctl("export", "old", "--format", "packed", "--out", "small").code == 0


def test_a_large_file_beside_the_weights_is_left_out(tmp_path):
    folder = save(tmp_path / "m", "llama")
    with (folder / "film.avi").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    assert "film.avi" not in dict(companion_files(folder))
