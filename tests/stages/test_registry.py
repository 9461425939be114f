"""The registry: built-in names, entry points, and what is said of names that are none."""

import sys
from pathlib import Path

import pytest

from stages.errors import UsageError
from stages.registry import Registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package "stall" with these entry points in the group lampctl.fruits, by name."""

    def installed(**points: str) -> None:
        metadata = tmp_path / "site" / "stall-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stall\nVersion: 1.0\n")
        lines = [f"{name} = {reference}" for name, reference in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[lampctl.fruits]", *lines, ""]))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return installed


@pytest.fixture
def fruits(install) -> Registry:
    """Two built-in entries, one entry point that works, one whose package is broken, one that hides a built-in."""
    install(zebra="fractions:Fraction", broken="no_such_package_at_all:Thing", path="fractions:Fraction")
    return Registry("fruit", {"path": "pathlib:Path", "colour": "colorsys:rgb_to_hls"})


def test_names_list_built_in_entries_first_and_import_nothing(fruits):
    sys.modules.pop("colorsys", None)
    assert fruits.names == ("path", "colour", "broken", "zebra")
    assert list(fruits) == list(fruits.names)
    assert "colour" in fruits
    assert "plum" not in fruits
    assert "colorsys" not in sys.modules


def test_an_entry_is_imported_when_it_is_asked_for(fruits):
    from fractions import Fraction
    from pathlib import Path

    assert fruits.get("path") is Path  # the entry point of the same name does not replace it
    assert fruits.get("zebra") is Fraction


def test_an_unknown_name_is_a_usage_error_that_names_the_nearest_and_all(fruits):
    with pytest.raises(
        UsageError, match=r"no fruit is called zebr \(did you mean zebra\?\): choose one of path, colour"
    ):
        fruits.get("zebr")


def test_a_plugin_that_cannot_be_imported_names_its_package(fruits):
    with pytest.raises(UsageError, match=r"fruit broken of the package stall cannot be imported"):
        fruits.get("broken")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def (", "SyntaxError"),
        ("Thing = 3", "no subclass of"),
        ("class Thing: pass", "no subclass of"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (r"raise RuntimeError('one\ntwo')", "RuntimeError: one two"),
    ],
)
def test_a_broken_plugin_takes_away_its_own_entry_only(install, monkeypatch, tmp_path, caplog, text, said):
    (tmp_path / "broken_fruit.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_fruit", raising=False)
    install(broken="broken_fruit:Thing")
    fruits = Registry("fruit", {"path": "pathlib:Path"}, base="pathlib:Path")
    with pytest.raises(UsageError, match=said):
        fruits.get("broken")
    assert fruits.items() == (("path", Path),)
    assert fruits.entries() == (Path,)
    assert caplog.text.count(said) == 1


PRUNER = """
from stages.pruners.base import Pruner
class Thing(Pruner):
    name = "thing"
    title = "thing"
    help = "Does nothing."
    def prune(self, layer, prepared): ...
"""


@pytest.mark.parametrize(
    ("lines", "lacks"), [(("title", "help"), "help, title"), (("def prune",), "prune"), (("name",), "name")]
)
def test_a_plugin_whose_class_is_not_complete_says_what_it_lacks(install, monkeypatch, tmp_path, lines, lacks):
    kept = [line for line in PRUNER.splitlines() if not line.strip().startswith(lines)]
    (tmp_path / "thin_pruner.py").write_text("\n".join(kept))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "thin_pruner", raising=False)
    install(thing="thin_pruner:Thing")
    with pytest.raises(UsageError, match=rf"fruit thing of the package stall lacks {lacks}: update"):
        Registry("fruit", {}, base="stages.pruners.base:Pruner").get("thing")


def test_a_reserved_name_and_a_built_in_one_are_not_for_plugins(install, caplog):
    install(path="fractions:Fraction", any="fractions:Fraction")
    fruits = Registry("fruit", {"path": "pathlib:Path"}, reserved=("any",))
    assert fruits.names == ("path",)
    assert "fruit path of the package stall is ignored" in caplog.text
    assert "fruit any of the package stall is ignored" in caplog.text
    with pytest.raises(ValueError, match="any"):
        fruits.register("any", 1)


def test_entries_can_be_added_by_hand_once_and_removed(fruits):
    fruits.register("fig", 1)
    assert fruits.get("fig") == 1
    assert fruits.names[-1] == "fig"
    with pytest.raises(ValueError, match="fig"):
        fruits.register("fig", 2)
    fruits.unregister("fig")
    assert "fig" not in fruits
    with pytest.raises(KeyError):
        fruits.unregister("path")
