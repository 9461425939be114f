"""Converted models: the cache holds weights; every other file is the source's, as it is when a run begins."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from stages.models.resolve import resolve
from tests import small_models
from tests.stages.models.test_quantized import CASES, quantized

pytestmark = pytest.mark.long  # seconds of conversion


def pickled(folder):
    small_models.save(folder, "llama-gqa")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


MAKERS = {"pickles": pickled, "fp8": lambda folder: quantized(folder, *CASES["fp8"])}
# Text that a file gets, by kind of file; None: the file goes away.
EDITS = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ other }}",
    "LICENSE": "other terms",
    "vocab.tiktoken": "YQ== 0",
    "spiece.model": "pieces",
    "templates/tools.jinja": "{{ tools }}",
    "preprocessor_config.json": '{"size": 3}',
    "generation_config.json": None,
}


def listing(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_is_edited_between_two_runs_is_read_anew(tmp_path, maker, name):
    source = tmp_path / "m"
    MAKERS[maker](source)
    (source / "generation_config.json").write_text("{}")
    before_path = resolve(str(source)).path
    before = listing(before_path)
    assert "generation_config.json" in before
    if (text := EDITS[name]) is None:
        (source / name).unlink()
    else:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    after = listing(resolve(str(source)).path)
    assert after.get(name) == (None if text is None else text.encode())
    assert {**before, name: None} == {**after, name: None}
    assert listing(before_path) == before, "a run that is under way keeps what it began with"


@pytest.mark.parametrize("maker", MAKERS)
def test_config_json_is_the_one_of_today_and_weights_are_converted_once(tmp_path, monkeypatch, maker):
    source = tmp_path / "m"
    MAKERS[maker](source)
    weights = next(resolve(str(source)).path.glob("*.safetensors")).resolve()
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("stages.models.quantized.folder._write", None)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.25}))
    found = resolve(str(source)).path
    assert json.loads((found / "config.json").read_text())["rms_norm_eps"] == 0.25
    assert next(found.glob("*.safetensors")).resolve() == weights


def test_another_dtype_or_scheme_in_config_json_gives_other_weights(tmp_path):
    source = tmp_path / "m"
    MAKERS["fp8"](source)
    settings = json.loads((source / "config.json").read_text())
    changes = (
        {"dtype": "bfloat16"},
        {"quantization_config": {**settings["quantization_config"], "scale_fmt": "ue8m0"}},
    )
    places = {resolve(str(source)).path}
    for change in changes:
        (source / "config.json").write_text(json.dumps({**settings, **change}))
        places.add(resolve(str(source)).path)
    assert len({next(place.glob("*.safetensors")).resolve() for place in places}) == 3


@pytest.mark.parametrize("maker", MAKERS)
def test_the_export_has_the_edited_files(lampctl, tmp_path, maker):
    MAKERS[maker](tmp_path / "m")
    flags = ("--sparsity", "0.5", "--method", "magnitude", "--evaluate", "")
    assert lampctl("run", "m", *flags, "--run-dir", "first").code == 0
    (tmp_path / "m" / "LICENSE").write_text("other terms")
    tokenizer = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()) | {"chat_template": "{{ mine }}"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert lampctl("run", "m", *flags, "--run-dir", "second").code == 0
    assert not (tmp_path / "first" / "model" / "LICENSE").exists()
    assert (tmp_path / "second" / "model" / "LICENSE").read_text() == "other terms"
    kept = json.loads((tmp_path / "second" / "model" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "{{ mine }}"
