"""Help names what can be chosen: every built-in entry of a registry, and those of installed packages."""

import os
import re
import subprocess
import sys

import pytest

from pipeline.config.declarations import options
from stages.data.registry import DATA_SOURCES, source_forms
from stages.pruners.registry import PRUNERS, lamp_pruners


@pytest.fixture
def installed(tmp_path):
    """Environment of a process that has a package with one entry per registry, none of which can be imported."""
    metadata = tmp_path / "site" / "mine-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    groups = {"pruners": "my-pruner", "metrics": "my-metric", "data_sources": "my-source"}
    lines = [f"[lampctl.{group}]\n{name} = no_such_package:Entry\n" for group, name in groups.items()]
    (metadata / "entry_points.txt").write_text("".join(lines))
    path = os.pathsep.join((str(tmp_path / "site"), *sys.path))
    return {**os.environ, "PYTHONPATH": path}


def shown(environment, *arguments):
    call = [sys.executable, "-m", "lampctl", *arguments]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_help_names_the_entries_of_installed_packages_and_imports_none(installed):
    text = shown(installed, "run", "--help")
    of_flag = {found[1]: " ".join(found[0].split()) for found in re.finditer(r"  --([a-z-]+) [^\n]*(\n {8}.*)*", text)}
    assert "wanda, magnitude or my-pruner" in of_flag["method"]
    assert "alps; of installed packages, if LAMP can use them: my-pruner." in of_flag["pruner"]
    assert "images:DIR; of installed packages: my-source." in of_flag["calibration"]
    assert "single-point IoU; of installed packages: my-source;" in of_flag["evaluate"]
    assert "those of installed packages: my-metric." in of_flag["metrics"]


def test_the_reference_does_not_depend_on_installed_packages(installed):
    assert shown(installed, "config", "reference") == shown(dict(os.environ), "config", "reference")


def test_the_help_of_built_in_entries_agrees_with_their_classes():
    builtin_sources = [form for name in DATA_SOURCES.builtin_names for form in DATA_SOURCES.get(name).forms()]
    assert builtin_sources == list(source_forms())
    about = options()["calibration"].builtin_text
    with_path = re.findall(r"\w+:[A-Z]+", about)
    # "as in c4:PATH" is said once for all that come from the hub.
    optional = [f"{name}:PATH" for name in DATA_SOURCES.builtin_names if DATA_SOURCES.get(name).path == "optional"]
    assert {*with_path, *optional} == {form for form in builtin_sources if ":" in form}
    named = set(re.findall(r"\w+", about))
    assert {form.partition(":")[0] for form in builtin_sources} <= named
    about = options()["pruner"].builtin_text
    builtin_pruners = [name for name in PRUNERS.builtin_names if name in about]
    assert builtin_pruners == [name for name in lamp_pruners() if name in PRUNERS.builtin_names]


def test_every_text_is_complete():
    for name, option in options().items():
        assert "{" not in option.text, name
        assert "{" not in option.builtin_text, name
