"""`lampctl export`: the step, the packed file, and the folder again."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.rundir import filesystem
from stages.formats.base import ExportFormat
from stages.formats.registry import EXPORT_FORMATS
from tests.conftest import TINY_OPT
from tests.pruned_folders import contents_of, pruned_folder
from tests.small_models import save

FLAGS = ("--method", "magnitude", "--evaluate", "", "--device", "cpu", "--run-dir", "r")


@pytest.fixture
def folder(tmp_path):
    return pruned_folder(tmp_path / "m", "llama", torch.bfloat16, bits=4)


def files_under(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_packed_folder_unpacks_to_the_same_bytes(lampctl, folder, tmp_path):
    packed = lampctl("export", "m", "--format", "packed", "--out", "small.safetensors", "--json")
    assert packed.code == 0, packed.err
    sizes = packed.json
    assert sizes["path"] == str(tmp_path / "small.safetensors")
    assert sizes["packed_bytes"] == Path("small.safetensors").stat().st_size
    assert sizes["dense_bytes"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert sizes["ratio"] == sizes["packed_bytes"] / sizes["dense_bytes"]
    back = lampctl("export", "--unpack", "small.safetensors", "--out", "back")
    assert back.code == 0, back.err
    assert f"{sizes['packed_bytes']:,}" in back.out
    assert "back" in back.out
    assert contents_of(Path("back")) == contents_of(folder)
    # Nothing else was made, here or there.
    assert {p.name for p in tmp_path.iterdir()} == {"m", "m-original", "small.safetensors", "back"}


def test_packed_file_is_beside_the_folder_and_its_parts_are_listed(lampctl, folder):
    shown = lampctl("export", "m", "--format", "packed")
    assert shown.code == 0, shown.err
    assert Path("m.packed.safetensors").is_file()
    for part in ("dense", "packed", "masks", "codes", "scales", "stored as they are", "m.packed.safetensors"):
        assert part in shown.out, part
    assert "values" not in shown.out  # there are none
    assert "Packing gained" not in shown.out


def test_packing_twice_does_nothing_and_other_files_need_force(lampctl, folder):
    call = ("export", "m", "--format", "packed", "--out", "small")
    first = lampctl(*call)
    before = Path("small").stat()
    again = lampctl(*call)
    assert (again.code, again.out) == (0, first.out)
    assert (Path("small").stat().st_ino, Path("small").stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    (folder / "README.md").write_text("Another card.\n")
    refused = lampctl(*call)
    assert refused.code == 2
    assert "--force" in refused.err
    assert Path("small").stat().st_ino == before.st_ino
    assert lampctl(*call, "--force").code == 0
    assert lampctl("export", "--unpack", "small", "--out", "back").code == 0
    assert Path("back/README.md").read_text() == "Another card.\n"

    Path("letter").write_text("dear reader")
    assert lampctl(*call[:-1], "letter").code == 2
    assert Path("letter").read_text() == "dear reader"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name a run directory"),
        (("m", "--format", "zip"), "choose one of folder, packed"),
        (("m", "--out", "x"), "--out, --force and --json belong to --format packed"),
        (("m", "--json"), "--out, --force and --json belong to --format packed"),
        (("m",), "m is no run directory"),
        (("gone", "--format", "packed"), "neither run.json nor config.json"),
        (("m-original", "--format", "packed"), "has no masks/"),
        (("m", "--format", "packed", "--out", "m/small"), "lies inside the model"),
        (("m", "--format", "packed", "--out", "m-original"), "is a folder: name a file"),
        (("--unpack", "small"), "--unpack requires --out"),
        (("m", "--unpack", "small", "--out", "x"), "excludes RUN"),
        (("--unpack", "gone", "--out", "x"), "no such file"),
        (("--unpack", "m/config.json", "--out", "x"), "is no packed model"),
        (("--unpack", "small", "--out", "m"), "not an empty folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_changes_no_file(lampctl, folder, tmp_path, flags, message):
    assert lampctl("export", "m", "--format", "packed", "--out", "small").code == 0
    before = files_under(tmp_path)
    answer = lampctl("export", *flags)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert answer.out == ""
    assert files_under(tmp_path) == before


def test_a_damaged_packed_file_leaves_no_folder(lampctl, folder, tmp_path):
    assert lampctl("export", "m", "--format", "packed", "--out", "small").code == 0
    data = bytearray(Path("small").read_bytes())
    data[len(data) // 2] ^= 1
    Path("small").write_bytes(data)
    before = files_under(tmp_path)
    answer = lampctl("export", "--unpack", "small", "--out", "back")
    assert answer.code == 4
    assert "small is damaged" in answer.err
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("flags", [("m", "--format", "packed", "--out", "x"), ("--unpack", "small", "--out", "x")])
def test_full_disk_while_packing_leaves_no_file(lampctl, folder, tmp_path, monkeypatch, flags):
    assert lampctl("export", "m", "--format", "packed", "--out", "small").code == 0
    before = files_under(tmp_path)

    class Full(filesystem.Calls):
        room = 50_000

        def write(self, descriptor, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data)

    monkeypatch.setattr(filesystem, "calls", Full())
    answer = lampctl("export", *flags)
    assert answer.code == 5
    assert "no room left" in answer.err
    assert files_under(tmp_path) == before


def test_packing_an_unfinished_run_names_the_missing_step(lampctl, tmp_path):
    original = save(tmp_path / "o")
    assert lampctl("init", original, "--sparsity", "0.5", *FLAGS).code == 0
    refused = lampctl("export", "r", "--format", "packed")
    assert refused.code == 2
    assert re.search(r"call lampctl prune-block \S+ --block 0 first", refused.err)
    for _ in range(3):
        assert lampctl("prune-block", "r").code == 0
    assert re.search(r"lampctl export \S+", lampctl("export", "r", "--format", "packed").err)
    done = lampctl("export", "r")
    assert done.code == 0, done.err
    assert "finished" in done.out


@pytest.mark.parametrize("flags", [("--sparsity", "0.7"), ("--sparsity", "0.5", "--bits", "4"), ("--pattern", "2:4")])
def test_packed_run_unpacks_to_the_same_model(lampctl, flags):
    """All of it: prune the small trained OPT, pack the run, unpack, load with transformers."""
    data = ("--calibration", "pydocs", "--num-samples", "4", "--seqlen", "64", "--method", "sparsegpt")
    ran = lampctl("run", TINY_OPT, *flags, *data, "--evaluate", "", "--device", "cpu", "--run-dir", "r")
    assert ran.code == 0, ran.err
    packed = lampctl("export", "r", "--format", "packed", "--json")
    assert packed.code == 0, packed.err
    assert not packed.err
    path = Path(packed.json["path"])
    assert path == Path("r/r.packed.safetensors").absolute()
    quantized = "--bits" in flags
    assert (packed.json["codes_bytes"] > 0, packed.json["values_bytes"] > 0) == (quantized, not quantized)
    assert packed.json["ratio"] < (0.45 if quantized else 0.8)

    assert lampctl("export", "--unpack", path, "--out", "back").code == 0
    assert contents_of(Path("back")) == contents_of(Path("r/model"))
    assert any(Path("back/masks").iterdir())
    ids = torch.arange(30).reshape(1, 30)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f, dtype="auto")(ids).logits for f in ("r/model", "back")]
    assert torch.equal(*logits)
    # It is a view: the run neither misses it nor minds it.
    before = json.loads(lampctl("status", "r", "--json").out)
    path.unlink()
    assert json.loads(lampctl("status", "r", "--json").out) == before


def test_a_run_whose_model_was_changed_is_not_packed(lampctl, tmp_path):
    original = save(tmp_path / "o")
    assert lampctl("run", original, "--sparsity", "0.5", *FLAGS).code == 0
    shard = Path("r/model/model-00001-of-00004.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # by a hard link, the committed file too
    answer = lampctl("export", "r", "--format", "packed")
    assert answer.code == 4
    assert "is damaged" in answer.err


class TextFormat(ExportFormat):
    """Names and sizes of the files, one a line."""

    name = "text"
    title = "listing"
    help = "the names of the files."
    suffix = ".txt"

    @classmethod
    def write(cls, folder, target, context):
        with context.create(target) as file:
            for path in sorted(folder.iterdir()):
                file.write(f"{path.name}\n".encode())


def test_a_format_of_another_package_is_written_by_its_name(lampctl, folder):
    EXPORT_FORMATS.register("text", TextFormat)
    try:
        shown = lampctl("export", "m", "--format", "text")
        assert shown.code == 0, shown.err
        assert "The listing is m.txt" in shown.out
        assert "config.json" in Path("m.txt").read_text().splitlines()
        assert lampctl("export", "m", "--format", "text").code == 2  # it cannot say that this is the same model
        assert lampctl("export", "m", "--format", "text", "--force", "--json").json["size_bytes"] > 0
    finally:
        EXPORT_FORMATS.unregister("text")
