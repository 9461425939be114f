"""The pruner of docs/pruners.md, installed as an entry point, works in every place where a built-in pruner does."""

import json
import re
import sys
from pathlib import Path

import pytest

from stages.pruners.registry import PRUNERS
from stages.testing.pruners import check_pruner
from tests.conftest import PRUNING_ALONE
from tests.small_models import save

PAGE = Path(__file__).parents[2] / "docs" / "pruners.md"
AMOUNT = (
    *("--calibration", "text:words.txt", "--num-samples", 4, "--seqlen", 32, "--evaluate", "text:words.txt"),
    *("--sparsity", 0.5, "--device", "cpu", "--threads", 1, *PRUNING_ALONE),
)


def code_blocks(language):
    """The code blocks of the page, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def plugin(tmp_path, monkeypatch, words):
    """The package `l1-pruner`, installed for this test."""
    site = tmp_path / "site"
    metadata = site / "l1_pruner-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "l1_pruner.py").write_text(code_blocks("python")[0])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: l1-pruner\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[lampctl.pruners]\n" + code_blocks("toml")[0].partition("\n")[2].replace('"', "")
    )
    monkeypatch.syspath_prepend(str(site))
    _forget()
    yield
    _forget()


def _forget():
    """Have the registry look for entry points again."""
    PRUNERS.__dict__.pop("_plugins", None)
    PRUNERS._loaded.pop("l1", None)


def test_it_conforms(plugin):
    check_pruner("l1")


def test_it_is_a_method_of_its_own(lampctl, tmp_path, plugin):
    folder = save(tmp_path / "m", "opt")
    answer = lampctl("run", folder, "--method", "l1", *AMOUNT, "--memory-limit", "8GB", "--run-dir", "r")
    assert answer.code == 0, answer.err
    assert "L1 score" in lampctl("status", "r").out
    assert lampctl("report", "r", "--out", "page").code == 0
    assert "L1 score" in (tmp_path / "page" / "index.html").read_text()
    assert "L1 score" in (tmp_path / "r" / "model" / "README.md").read_text()


def test_lamp_prunes_with_it(lampctl, tmp_path, plugin):
    folder = save(tmp_path / "m", "llama-gqa")
    flags = ("--method", "lamp", "--pruner", "l1", "--epochs", 1, "--no-refine")
    answer = lampctl("run", folder, *flags, *AMOUNT, "--run-dir", "r")
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["pruner"] == "l1"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise RuntimeError('no\\nscore')", "RuntimeError: no\\nscore"),
        ("layer.weight @ layer.weight[0, :1]", "RuntimeError: size mismatch"),  # inside torch, which it calls
    ],
)
def test_an_error_of_its_code_names_its_package_and_module(lampctl, tmp_path, plugin, monkeypatch, line, reason):
    path = tmp_path / "site" / "l1_pruner.py"
    start = "        scores = "
    assert path.read_text().count(start) == 1
    path.write_text(path.read_text().replace(start, f"        {line}\n{start}"))
    monkeypatch.delitem(sys.modules, "l1_pruner", raising=False)
    answer = lampctl("run", save(tmp_path / "m", "opt"), "--method", "l1", *AMOUNT, "--run-dir", "r")
    monkeypatch.delitem(sys.modules, "l1_pruner")
    assert answer.code == 1
    first, *rest = answer.err[answer.err.index("lampctl: ") :].splitlines()
    assert first.startswith(f"lampctl: the package l1-pruner failed in its module l1_pruner ({reason}")
    assert rest[0].startswith("Traceback")
    assert "bug of ours" not in answer.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "l1", "--bits", 4), "L1 score pruning cannot quantize"),
        (("--method", "lamp", "--pruner", "l1", "--bits", 4), "L1 score pruning cannot quantize"),
        (("--method", "l1", "--pattern", "2:4"), "L1 score pruning does not support N:M patterns"),
    ],
)
def test_what_it_does_not_support_is_refused_before_anything_runs(lampctl, tmp_path, plugin, flags, message):
    folder = save(tmp_path / "m", "opt")
    amount = AMOUNT if "--pattern" not in flags else [flag for flag in AMOUNT if flag not in ("--sparsity", 0.5)]
    answer = lampctl("run", folder, *flags, *amount, "--run-dir", "r")
    assert (answer.code, (tmp_path / "r").exists()) == (2, False)
    assert message in " ".join(answer.err.split())


def test_a_run_stays_readable_without_the_package_and_refuses_to_resume(lampctl, tmp_path, plugin, monkeypatch):
    folder = save(tmp_path / "m", "opt")
    assert lampctl("init", folder, "--method", "l1", *AMOUNT, "--run-dir", "r").code == 0
    assert lampctl("calibrate", "r").code == 0
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path / "site")])
    _forget()
    status = lampctl("status", "r")
    assert (status.code, "l1" in status.out) == (0, True), status.err
    answer = lampctl("resume", "r")
    assert answer.code == 2
    assert "no pruner is called l1" in answer.err
