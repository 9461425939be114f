"""Make the golden run directories of the schema in force: once for each, before it is released.

    python -m tests.golden.make

They are never changed afterwards: later versions must open them. tests/golden/schema-N/standin is a run by the stages
of tests/faults/small_run.py, stopped in the middle; tests/golden/schema-N/records the records of a real run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.rundir.records import RunManifest
from tests.faults.disks import Crash
from tests.faults.test_mutations import run_until

HERE = Path(__file__).parent
STOPPED_BEFORE = "prune-block/1"


def main() -> None:
    place = HERE / f"schema-{RunManifest.newest_schema}"
    if place.exists():
        sys.exit(f"{place} is there already: what was released is never changed")
    try:
        run_until(place / "standin", STOPPED_BEFORE)
    except Crash:
        print("stopped as it should")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        records_of_a_real_run(run)
        shutil.copytree(run / "commits", place / "records" / "commits")
        shutil.copy(run / "run.json", place / "records")


def records_of_a_real_run(run: Path) -> None:
    from lampctl.app import main as lampctl

    tiny = HERE.parents[1] / "examples" / "tiny-opt"
    amount = ("--calibration", "pydocs", "--num-samples", "2", "--seqlen", "32", "--evaluate", "pydocs")
    flags = (*amount, "--eval-max-tokens", "64", "--epochs", "1", "--refine-epochs", "1", "--device", "cpu")
    sys.argv = ["lampctl", "run", str(tiny), "--sparsity", "0.6", *flags, "--run-dir", str(run)]
    with contextlib.suppress(SystemExit):
        lampctl()
    assert (run / "model" / "README.md").exists()


if __name__ == "__main__":
    main()
