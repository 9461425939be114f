"""A LAMP run of a small model, made once for the tests that read what is reported of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_models import save

WORDS = "The quick brown fox jumps over the lazy dog, and then it does so again. "


def call(*arguments: object) -> None:
    """Call lampctl in this process; it must succeed."""
    from lampctl.app import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lampctl", *map(str, arguments)])
        code = None
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        assert not code, f"lampctl {arguments[0]} ended with {code}"


@contextlib.contextmanager
def made(folder: Path) -> Iterator[Path]:
    """The folder with a model `m`, a LAMP run `lamp` and a SparseGPT run `lamp-sparsegpt` beside it."""
    save(folder / "m")
    (folder / "words.txt").write_text(WORDS * 20)
    data = ("--calibration", f"text:{folder}/words.txt", "--num-samples", 6, "--seqlen", 64, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMPCTL_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        training = ("--epochs", 2, "--refine-epochs", 1, "--baseline", "sparsegpt")
        flags = ("--evaluate", f"text:{folder}/words.txt", "--run-dir", folder / "lamp")
        call("run", folder / "m", "--sparsity", 0.6, *data, *training, *flags)
        yield folder


def commits(run: Path) -> dict[str, Any]:
    """The run's commits as they lie on the disk, by step."""
    records = [json.loads(path.read_text()) for path in sorted((run / "commits").glob("*.json"))]
    return {record["step"]: record for record in records}
