"""Every export format: it describes itself, and a file format knows the folder it was written from."""

from __future__ import annotations

import pytest
import torch

from stages.formats.registry import EXPORT_FORMATS, file_formats, format_help
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
    entry.write(folder, file, NullCallbacks(), open_new)
    assert entry.holds(file, folder)
    sizes = entry.sizes(file)
    assert sizes is None or sizes.packed_bytes == file.stat().st_size
    (folder / "README.md").write_text("changed")
    assert not entry.holds(file, folder)
    assert not entry.holds(folder / "config.json", folder)
