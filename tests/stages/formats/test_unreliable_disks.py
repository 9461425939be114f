"""Weights on a disk that fails: an error that Python can catch, with the exit code that says what to do."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lampctl.cli.exit_codes import DAMAGED, PREEMPTED, exit_code, message
from stages.errors import DamagedFileError, StorageUnavailableError
from stages.formats.checkpoint_files import StateFile, WeightFiles
from stages.formats.file_digest import digest_file
from stages.models.convert import from_pickles
from tests.small_models import save

pytestmark = pytest.mark.long

BIG = {"first": torch.arange(3.0), "second": torch.randn(700_000)}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    save_file(BIG, path / "model.safetensors")
    return path


def failing(number):
    def preadv(descriptor, buffers, offset):
        raise OSError(number, os.strerror(number))

    return preadv


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EIO, errno.ESTALE])
def test_a_disk_that_does_not_answer_is_a_reason_to_try_again(folder, monkeypatch, number):
    files, state = WeightFiles(folder), StateFile(folder / "model.safetensors")
    monkeypatch.setattr(os, "preadv", failing(number))
    for read in (lambda: files.load("second"), lambda: state["second"], lambda: WeightFiles(folder)):
        with pytest.raises(StorageUnavailableError, match=r"model\.safetensors cannot be read now") as caught:
            read()
        assert exit_code(caught.value) == PREEMPTED
        assert "\n" not in message(caught.value)


def test_a_file_that_is_truncated_while_it_is_used_does_not_end_the_process(folder):
    # In a process of its own: through a mapping, this is a SIGBUS.
    code = (
        "import os, sys; from pathlib import Path; from stages.formats.checkpoint_files import WeightFiles\n"
        "from lampctl.cli.exit_codes import exit_code, message\n"
        "folder = Path(sys.argv[1]); files = WeightFiles(folder)\n"
        "kept = files.load('second')\n"
        "os.truncate(folder / 'model.safetensors', 4096)\n"
        "assert float(kept.sum()) == float(kept.clone().sum())\n"
        "try: files.load('second')\n"
        "except Exception as error: print(message(error)); sys.exit(exit_code(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == DAMAGED, done.stderr
    assert "is truncated" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_truncated_file_is_damaged_from_the_beginning(folder):
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors is truncated.*100,000 bytes"):
        WeightFiles(folder)


def test_a_command_on_a_truncated_model_ends_with_one_line(lampctl, tmp_path):
    shard = save(tmp_path / "m", "llama") / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    answer = lampctl("run", "m", "--sparsity", "0.5", "--method", "magnitude", "--run-dir", "r")
    assert answer.code == DAMAGED
    assert "is truncated" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_digest_on_a_disk_that_does_not_answer_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"x")

    def stale(*args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("hashlib.file_digest", stale)
    with pytest.raises(StorageUnavailableError, match="x cannot be read now"):
        digest_file(path)


def test_pickles_are_not_mapped(tmp_path, monkeypatch):
    folder = save(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    torch.save(BIG, folder / "pytorch_model.bin")
    maps = Path("/proc/self/maps")
    seen, load = [], torch.load

    def watched(*args, **kwargs):
        found = load(*args, **kwargs)
        seen.append("pytorch_model.bin" in maps.read_text())
        return found

    monkeypatch.setattr(torch, "load", watched)
    found = WeightFiles(from_pickles(folder))
    assert seen == [False]
    assert all(torch.equal(found.load(name), tensor) for name, tensor in BIG.items())


def test_a_run_stopped_by_a_stale_share_resumes_to_the_same_bits(lampctl, tmp_path, monkeypatch):
    save(tmp_path / "m", "llama")
    flags = ("--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--device", "cpu")
    assert lampctl("run", "m", *flags, "--run-dir", "whole").code == 0
    read, calls = os.preadv, []

    def unsteady(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", unsteady)
    stopped = lampctl("run", "m", *flags, "--run-dir", "r")
    assert stopped.code == PREEMPTED, stopped.err
    assert "cannot be read now" in stopped.err.splitlines()[-1]
    assert "Traceback" not in stopped.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / "cache"))
    assert lampctl("resume", "r").code == 0
    for path in Path("whole/model").glob("*.safetensors"):
        assert (Path("r/model") / path.name).read_bytes() == path.read_bytes()
