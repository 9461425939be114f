"""Names of files that no record can hold, or that the export needs itself, are refused before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import lampctl as lampctl_api
from pipeline.errors import ConfigError, UnsupportedPlace
from pipeline.rundir.records import Record
from stages.errors import UsageError
from stages.formats.file_digest import local_path, real_path
from stages.models.companion_files import LARGEST_BYTES, companions_of
from stages.models.resolve import resolve
from tests import small_sam
from tests.small_models import save

FLAGS = ("--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--device", "cpu", "--run-dir", "r")
NO_UTF8 = os.fsdecode(b"x\xff")


def refused(lampctl, model, says, *flags):
    answer = lampctl("run", model, *FLAGS, *flags)
    assert answer.code == 2, answer.err
    assert says in answer.err
    assert "Traceback" not in answer.err
    assert not Path("r").exists()


@pytest.mark.parametrize("name", [f"{NO_UTF8}.json", f"{NO_UTF8}/a.json", "a\\b.txt"])
def test_a_file_of_the_model_whose_name_no_record_can_hold(lampctl, tmp_path, name):
    path = save(tmp_path / "m", "llama") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    refused(lampctl, "m", "cannot be exported", "--export-dtype", "bfloat16")


@pytest.mark.parametrize(
    "name",
    [
        *("model-00001-of-00004.safetensors/x.txt", "model.safetensors.index.json/x.txt", "masks"),
        *("masks/block-00002.safetensors/x.txt", "README.md/x.txt", "ORIGINAL_README.md/x.txt", "readme.md"),
    ],
)
def test_a_file_of_the_model_in_the_place_of_an_exported_one(lampctl, tmp_path, name):
    folder = save(tmp_path / "m", "llama")
    if name in ("readme.md", "ORIGINAL_README.md/x.txt"):
        (folder / "README.md").write_text("card")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    answer = lampctl("run", "m", *FLAGS)
    if name == "ORIGINAL_README.md/x.txt":
        assert answer.code == 0, answer.err  # the card has another name then
        assert [path.read_text() for path in Path("r/model").glob("ORIGINAL_README_*.md")] == ["card"]
    else:
        assert answer.code == 2, answer.err
        assert "has the name of a file that the export writes" in answer.err
        assert not Path("r").exists()


def test_a_folder_in_the_place_of_the_checkpoint_of_segment_anything(lampctl, tmp_path):
    folder = small_sam.save(tmp_path / "m")
    (folder / "sam.pth").mkdir()
    (folder / "sam.pth" / "x.txt").write_text("x")
    refused(lampctl, "m", "sam.pth/x.txt has the name of a file that the export writes")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_data_whose_name_no_record_can_hold(lampctl, tmp_path, kind):
    save(tmp_path / "m", "llama")
    Path(f"{NO_UTF8}.txt").write_text("{}")
    refused(lampctl, "m", "is not UTF-8", "--calibration", f"{kind}:{NO_UTF8}.txt", "--method", "wanda")
    Path(NO_UTF8).mkdir()
    refused(lampctl, "m", "is not UTF-8", "--calibration", f"images:{NO_UTF8}", "--method", "wanda")


def test_a_model_and_data_below_a_folder_whose_name_no_record_can_hold(lampctl, tmp_path, monkeypatch):
    Path(NO_UTF8).mkdir()
    shutil.move(save(tmp_path / "m", "llama"), NO_UTF8)
    monkeypatch.chdir(NO_UTF8)
    refused(lampctl, "m", "is not UTF-8")


def test_no_record_holds_a_text_that_is_not_utf8():
    class Named(Record):
        names: dict[str, list[str]]

    assert Named.new(names={"ü": ["\n"]}).names == {"ü": ["\n"]}
    for names in ({"a": [NO_UTF8]}, {NO_UTF8: []}):
        with pytest.raises(ConfigError, match="no record can hold it"):
            Named.new(names=names)


def test_paths_that_are_none(tmp_path):
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(UsageError, match="NUL"):
        local_path("a\0b")
    with pytest.raises(UsageError, match="in a circle"):
        real_path(str(tmp_path / "loop"))


def test_linked_folders_go_along_and_circles_are_named(lampctl, tmp_path):
    folder, elsewhere = save(tmp_path / "m", "llama"), tmp_path / "elsewhere"
    (elsewhere / "deeper").mkdir(parents=True)
    (elsewhere / "deeper" / "tools.jinja").write_text("{{ tools }}")
    os.symlink(elsewhere, folder / "templates")
    os.symlink("..", elsewhere / "deeper" / "up")
    os.symlink(".", folder / "again")
    os.symlink("nowhere", folder / "dangling")
    os.symlink("self", folder / "self")
    assert resolve("m").left_out == (
        "again/ (a link to a folder that holds it)",
        "dangling (no file)",
        "self (no file)",
        "templates/deeper/up/ (a link to a folder that holds it)",
    )
    answer = lampctl("run", "m", *FLAGS)
    assert answer.code == 0, answer.err
    assert Path("r/model/templates/deeper/tools.jinja").read_text() == "{{ tools }}"
    assert "not exported: again/ (a link to a folder that holds it), dangling (no file)" in answer.err


def test_what_is_left_out_is_said(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    for name in ("vocab.txt.gz", "emb.npz", "added.tmp", "tf_model.h5", "other.safetensors"):
        (folder / name).write_bytes(b"x")
    for name in (
        "onnx/model.onnx",
        "onnx/config.json",
        ".git/config",
        "kept/a.json",
        "kept/b.zip",
        "__pycache__/a.pyc",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with (folder / "film.avi").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    expected = (
        *("added.tmp", "emb.npz", "film.avi (larger than 100 MB)", "kept/b.zip", "onnx/", "other.safetensors"),
        *("tf_model.h5", "vocab.txt.gz"),
    )
    assert resolve("m").left_out == expected
    answer = lampctl("run", "m", *FLAGS)
    assert answer.code == 0, answer.err
    assert (
        f"not exported: {', '.join(expected)}, which lie beside the weights of {folder} (weights among them would be "
        "those before pruning)"
    ) in answer.err.replace("\n", " ")
    shutil.rmtree(folder / "onnx")
    assert companions_of(save(tmp_path / "plain", "llama"), ["model.safetensors"]).left_out == ()


def test_a_run_directory_that_can_be_none(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    answer = lampctl("run", "m", *FLAGS[:-1], "loop")
    assert answer.code == 2, answer.err
    assert "loop cannot be a folder" in answer.err
    with pytest.raises(UnsupportedPlace, match="cannot be a folder"):
        lampctl_api.run("m", run_dir="a\0b", sparsity=0.5, method="magnitude", evaluate=())
    with pytest.raises(UnsupportedPlace, match="cannot be a folder"):
        lampctl_api.open_run("a\0b")


def test_a_folder_with_the_name_of_a_deciding_file_is_none(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for name in ("spiece.model", "other.safetensors"):
        (folder / name).mkdir()
        (folder / name / "x.txt").write_text("x")
    assert lampctl("run", "m", *FLAGS).code == 0
    assert Path("r/model/spiece.model/x.txt").read_text() == "x"
