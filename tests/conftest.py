"""Shared by all tests: the command line, called in this process, and the trained tiny OPT."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Small models compute fastest on one thread, and tests run side by side. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# For runs in which nothing is asked of distillation and the end loss: a third of their time.
PRUNING_ALONE = ("--no-distill", "--no-end-loss")
TINY_OPT = Path(__file__).parents[1] / "examples" / "tiny-opt"


_WITH_RUNS = ("tests/faults/", "tests/lampctl/commands/", "tests/lampctl/report/", "tests/examples/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that make no run as `unit`: `make check` runs them."""
    for item in items:
        makes_runs = item.nodeid.startswith(_WITH_RUNS) or "lampctl" in getattr(item, "fixturenames", ())
        if not makes_runs and not any(item.get_closest_marker(name) for name in ("slow", "smollm2", "long", "gpu")):
            item.add_marker("unit")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _nothing_from_outside(tmp_path, monkeypatch):
    """Each test has a folder and a cache of its own, and no setting from the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lampctl(monkeypatch, capsys) -> Callable[..., Answer]:
    """Call lampctl in this process, as `lampctl(*arguments)`."""
    from lampctl.app import main

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lampctl", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def words(tmp_path) -> Path:
    """words.txt in the test's folder: some thousand characters of English."""
    from pydoc_data.topics import topics

    path = tmp_path / "words.txt"
    path.write_text(topics["compound"][:4000])
    return path
