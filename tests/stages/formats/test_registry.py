"""Every export format: it describes itself, and a file format knows the folder it was written from."""

from __future__ import annotations

import shutil
import zipfile

import pytest
import torch

from stages.errors import UsageError
from stages.formats.base import ExportFormat, FormatContext
from stages.formats.registry import EXPORT_FORMATS, file_formats, format_help, format_of, restoring_formats
from stages.formats.safetensors_io import open_new
from stages.in_memory import NullCallbacks
from tests.pruned_folders import pruned_folder


@pytest.mark.parametrize("name", EXPORT_FORMATS.names)
def test_every_format_describes_itself(name):
    entry = EXPORT_FORMATS.get(name)
    assert entry.name == name
    assert entry.title
    assert "\n" not in entry.help
    assert entry.suffix is None or entry.suffix.startswith(".")
    assert f"{name}: {entry.help}" in format_help()


@pytest.mark.parametrize("name", file_formats())
def test_a_file_format_holds_exactly_its_folder(tmp_path, name):
    entry, folder = EXPORT_FORMATS.get(name), pruned_folder(tmp_path / "m", "llama", torch.float32)
    file = tmp_path / f"m{entry.suffix}"
    entry.write(folder, file, FormatContext(NullCallbacks(), open_new))
    assert entry.holds(file, folder)
    sizes = entry.sizes(file)
    assert sizes is None or sizes.packed_bytes == file.stat().st_size
    (folder / "README.md").write_text("changed")
    assert not entry.holds(file, folder)
    assert not entry.holds(folder / "config.json", folder)


class Archive(ExportFormat):
    """A format of another package: all files of the folder, one behind the other."""

    name = "archive"
    title = "archive"
    help = "all files in one."
    suffix = ".zip"
    can_restore = True

    @classmethod
    def write(cls, folder, target, context):
        shutil.make_archive(str(target.with_suffix("")), "zip", folder)

    @classmethod
    def require_restorable(cls, file):
        if not zipfile.is_zipfile(file):
            raise UsageError(f"{file} is no archive")

    @classmethod
    def restore(cls, file, folder, context):
        shutil.unpack_archive(file, folder)


@pytest.fixture
def archive():
    EXPORT_FORMATS.register("archive", Archive)
    yield
    EXPORT_FORMATS.unregister("archive")


@pytest.mark.parametrize("name", [entry.name for entry in restoring_formats()] + ["archive"])
def test_a_format_that_restores_is_found_and_gives_every_file_back(archive, tmp_path, name):
    entry, folder = EXPORT_FORMATS.get(name), pruned_folder(tmp_path / "m", "llama", torch.float32)
    file = tmp_path / f"m{entry.suffix}"
    entry.write(folder, file, FormatContext(NullCallbacks(), open_new))
    assert format_of(file) is entry
    (tmp_path / "back").mkdir()
    entry.restore(file, tmp_path / "back", FormatContext(NullCallbacks(), open_new))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(
        str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()
    )
    assert all((folder / each).read_bytes() == (tmp_path / "back" / each).read_bytes() for each in names)


def test_a_file_that_no_format_restores_is_refused_with_every_reason(archive, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("words")
    with pytest.raises(UsageError, match=r"no packed model.*; .*no archive"):
        format_of(file)
