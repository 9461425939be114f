"""Runs that kill themselves, and the weights that they end with."""

from __future__ import annotations

import json
from pathlib import Path

# Runs the command line with a bomb: the process kills itself when a step of kind sys.argv[1] reports progress
# for the second time, in the middle of its work.
BOMB = """
import os, signal, sys
from pipeline.engine import runner as engine

kind, count = sys.argv[1], 0
report = engine.StepCallbacks.report

def explode(self, done, total, unit, **figures):
    global count
    report(self, done, total, unit, **figures)
    count += self._step.kind == kind
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)

engine.StepCallbacks.report = explode
sys.argv[:2] = ["lampctl"]
from lampctl.app import main
main()
"""

# Sends itself a signal at a batch boundary of a step of this kind, after a given number of boundaries.
BOMB_AT_CHECKPOINT = """
import os, signal, sys
from pipeline.engine import runner as engine

kind, number, wanted, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 0
checkpoint = engine.StepCallbacks.checkpoint

def explode(self, make):
    global count
    count += self._step.kind == kind and self._step.block in (None, 1)
    if count == wanted and number == signal.SIGTERM:
        os.kill(os.getpid(), number)
    checkpoint(self, make)
    if count == wanted:
        os.kill(os.getpid(), number)

engine.StepCallbacks.checkpoint = explode
sys.argv[:4] = ["lampctl"]
from lampctl.app import main
main()
"""


def exported_weights(run: Path) -> dict[str, str]:
    """SHA-256 of every file of the exported model, by name, as committed."""
    commits = [json.loads(path.read_text()) for path in sorted((run / "commits").iterdir())]
    export = next(commit for commit in commits if commit["step"] == "export")
    return {Path(f["path"]).name: f["sha256"] for f in export["payloads"]["model"]["files"]}
