"""Entry points are found wherever importlib.metadata finds them; it is imported only where there may be some."""

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points

import pytest

from stages.entry_points import entry_points_of, may_have_entries

GROUP = "lampctl.fruits"
ENTRY = "fig = fractions:Fraction\n"


def installed(site, folder, text):
    metadata = site / folder
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stall\nVersion: 1.0\n")
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: stall\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(text)


@pytest.mark.parametrize(
    ("site", "folder"),
    [
        ("site", "stall-1.0.dist-info"),
        ("site", "stall-1.0.DIST-INFO"),
        ("site", "stall.egg-info"),
        ("stall-1.0-py3.11.egg", "EGG-INFO"),
    ],
)
@pytest.mark.parametrize("text", [f"[{GROUP}]\n{ENTRY}", f"[other]\n{ENTRY}\r\n   [{GROUP}]   \r\n  {ENTRY}"])
def test_it_is_found_in_every_form_of_metadata(tmp_path, monkeypatch, site, folder, text):
    assert entry_points_of(GROUP) == []
    installed(tmp_path / site, folder, text)
    monkeypatch.syspath_prepend(str(tmp_path / site))
    assert [point.name for point in entry_points(group=GROUP)] == ["fig"]  # what importlib.metadata says
    assert [point.name for point in entry_points_of(GROUP)] == ["fig"]
    assert not may_have_entries("lampctl.trees")


def test_it_is_found_in_the_current_folder(tmp_path, monkeypatch):
    installed(tmp_path, "stall-1.0.dist-info", f"[{GROUP}]\n{ENTRY}")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert [point.name for point in entry_points_of(GROUP)] == ["fig"]


def test_it_is_found_in_a_zip_archive(tmp_path, monkeypatch):
    archive = tmp_path / "stall.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("stall-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stall\nVersion: 1.0\n")
        file.writestr("stall-1.0.dist-info/entry_points.txt", f"[{GROUP}]\n{ENTRY}")
    monkeypatch.syspath_prepend(str(archive))
    assert [point.name for point in entry_points_of(GROUP)] == ["fig"]


def test_other_finders_are_asked(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(*_):
            return None

        @staticmethod
        def find_distributions(context):
            return iter(())

    assert not may_have_entries(GROUP)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert may_have_entries(GROUP)


def test_a_package_that_is_installed_or_removed_later_is_seen(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    assert not may_have_entries(GROUP)
    installed(site, "stall-1.0.dist-info", f"[{GROUP}]\n{ENTRY}")
    assert may_have_entries(GROUP)
    (site / "stall-1.0.dist-info").rename(tmp_path / "elsewhere")
    assert not may_have_entries(GROUP)


def test_folders_and_files_that_cannot_be_read_have_no_entries(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "folder-1.0.dist-info" / "entry_points.txt").mkdir(parents=True)
    (site / "file-1.0.egg-info").write_text("Name: file\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site), str(tmp_path / "gone")])
    assert not may_have_entries(GROUP)


def test_an_installation_without_entries_imports_no_metadata():
    code = (
        "import sys; from stages.entry_points import entry_points_of\n"
        "assert entry_points_of('lampctl.fruits') == []\n"
        "assert 'importlib.metadata' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
