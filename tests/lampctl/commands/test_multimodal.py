"""The text tower of a multimodal model is pruned; all else is exported as it was, and opens as the same class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.formats.checkpoint_files import WeightFiles
from stages.formats.pruning_masks import read_mask_file
from stages.generate import continue_prompts
from stages.in_memory import NullCallbacks
from stages.metrics.zero_shot import ZeroShot
from stages.models.loader import loader_of
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.testing.models import check_model_family
from tests import multimodal_models, small_models
from tests.multimodal_models import FAMILIES
from tests.small_models import VOCAB

FLAGS = ("--sparsity", "0.5", "--evaluate", "", "--device", "cpu", "--run-dir", "r")


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_text_tower_computes_what_the_whole_model_does_on_text(tmp_path, family):
    folder = multimodal_models.save(tmp_path / "m", family)
    reference = multimodal_models.load(folder, dtype=torch.float32).eval()
    if family == "llama4":  # transformers 5.24: the whole model's own forward of text fails ('image_outputs')
        reference = reference.language_model
    for shape in ((1, 24), (2, 7)):

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            return reference(input_ids=inputs, use_cache=False).logits

        check_model_family("decoder", resolve(str(folder)), token_ids(*shape), forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_multimodal_model_is_lost(lampctl, tmp_path, family):
    folder = multimodal_models.save(tmp_path / "m", family, torch.bfloat16)
    answer = lampctl("run", "m", *FLAGS, "--method", "magnitude")
    assert answer.code == 0, answer.err
    assert answer.err.count("exported unpruned and unchanged") == 1
    source, found = WeightFiles(folder), WeightFiles(Path("r/model"))
    assert set(found.keys) == set(source.keys)
    masks = {
        layer.key: layer.mask.T if layer.transposed else layer.mask
        for path in sorted(Path("r/model/masks").iterdir())
        for layer in read_mask_file(path).values()
        if layer.mask.any()
    }
    assert len(masks) >= 2 * 7
    assert not any("vis" in name for name in masks)
    for name in source.keys:
        ours, theirs = found.load(name), source.load(name)
        if name in masks:
            assert torch.equal(ours, theirs.masked_fill(masks[name], 0)), name
        else:
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    opened, info = multimodal_models.load("r/model", output_loading_info=True)
    original, expected = multimodal_models.load(folder, output_loading_info=True)
    assert info == expected
    assert not info["missing_keys"]
    assert type(opened) is type(original)


@pytest.mark.parametrize("family", ["gemma3", "qwen2.5-vl", "mistral3"])
def test_a_text_tower_is_compensated_on_text(lampctl, tmp_path, words, family):
    multimodal_models.save(tmp_path / "m", family)
    data = ("--calibration", "text:words.txt", "--num-samples", "4", "--seqlen", "16", "--effort", "low")
    answer = lampctl("run", "m", *FLAGS, "--method", "lamp", *data)
    assert answer.code == 0, answer.err
    again = lampctl("evaluate", "r", "--evaluate", "text:words.txt", "--eval-seqlen", "16", "--json")
    assert again.code == 0, again.err
    _, info = multimodal_models.load("r/model", output_loading_info=True)
    assert not any(info.values())


def test_towers_stay_on_disk_while_text_is_computed(tmp_path, monkeypatch):
    model = open_model(resolve(str(multimodal_models.save(tmp_path / "m", "gemma3"))))
    loaded = []
    load = WeightFiles.load
    monkeypatch.setattr(WeightFiles, "load", lambda files, key, *rest: (loaded.append(key), load(files, key, *rest))[1])
    model.load_ends(torch.device("cpu"))
    assert loaded
    assert not any("vision_tower" in key for key in loaded)


def test_a_checkpoint_whose_tower_is_missing_is_exported_as_it_is(lampctl, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = multimodal_models.save(tmp_path / "m", "gemma3")
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision_tower" not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert lampctl("run", "m", *FLAGS, "--method", "magnitude").code == 0
    assert set(WeightFiles(Path("r/model")).keys) == kept.keys()


def test_what_is_said_of_loading_the_exported_model_works(lampctl, tmp_path):
    multimodal_models.save(tmp_path / "m", "mistral3")
    answer = lampctl("run", "m", *FLAGS, "--method", "magnitude")
    assert "AutoModelForMultimodalLM.from_pretrained" in answer.out
    assert 'model = AutoModelForMultimodalLM.from_pretrained("PATH' in Path("r/model/README.md").read_text()
    written = continue_prompts(Path("r/model"), ["a word"], 3, torch.device("cpu"), NullCallbacks())
    assert len(written) == 1
    small_models.save(tmp_path / "t", "llama")
    assert loader_of(tmp_path / "t") == "AutoModelForCausalLM"


def test_tasks_measure_a_multimodal_model_by_its_text(tmp_path):
    pytest.importorskip("lm_eval")
    folder = multimodal_models.save(tmp_path / "m", "mistral3")
    model = ZeroShot(resolve(str(folder)), "cpu")._model.model
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
