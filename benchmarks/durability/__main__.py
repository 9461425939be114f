"""What it costs that no crash can undo a step: the share of a run's wall time, SmolLM2-135M.

    python -m benchmarks.durability

Runs `lampctl run` twice, by SparseGPT (little work for each byte written: the worst case) and by LAMP, each with a stop
watch around every flush, every digest, every record and every deletion, and writes benchmarks/results/durability.md.
What a thread does while another one computes is counted too, so the shares are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.durability.stop_watch import StopWatch, run_lampctl, watch_durability
from benchmarks.reporting import RESULTS, ROOT, machine, markdown_table, software, write_page

RUNS = {
    "SparseGPT": ("--method", "sparsegpt", "--sparsity", "0.6"),
    "LAMP, effort low": ("--method", "lamp", "--effort", "low", "--sparsity", "0.6"),
}
COMMON = ("--num-samples", "32", "--seqlen", "256", "--calibration", "pydocs", "--evaluate", "", "--no-evaluate-dense")
KINDS = {
    "flush": "flushing files and folders (fsync)",
    "digest": "sha256 of what is written and read",
    "record": "commit records, run.json, views",
    "tidy": "deleting what is released",
    "check": "comparing sizes and presence before going on",
}


def run_one(arguments: list[str], report: Path) -> None:
    """`lampctl` with these arguments in this process; its seconds go to `report`."""
    start = time.perf_counter()
    watch = StopWatch()
    watch_durability(watch)
    run_lampctl(arguments)
    report.write_text(json.dumps({"wall": time.perf_counter() - start, "seconds": watch.seconds}))


def measure(name: str, model: str, work: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    report = work / "report.json"
    arguments = ["run", model, *RUNS[name], *COMMON, "--run-dir", str(work / "run")]
    command = [sys.executable, "-m", "benchmarks.durability", "--inside", str(report), "--", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment, cwd=ROOT)
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="on the disk to measure")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_one(args.arguments, args.inside)
        return
    columns = {}
    for name in RUNS:
        args.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.work.absolute()) as folder:
            columns[name] = measure(name, args.model, Path(folder))
    write_page(RESULTS / "durability.md", markdown(args.model, columns))


def markdown(model: str, columns: dict[str, dict[str, Any]]) -> list[str]:
    """A table with one row per kind of work and one column per run."""

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *(value(column) for column in columns.values())]

    def share(column: dict[str, Any], seconds: float) -> str:
        return f"{100 * seconds / column['wall']:.2f}%"

    rows = [
        *(row(text, lambda c, k=kind: share(c, c["seconds"].get(k, 0.0))) for kind, text in KINDS.items()),
        row("together", lambda c: share(c, sum(c["seconds"].values()))),
        row("wall time, s", lambda c: f"{c['wall']:.0f}"),
    ]
    return [
        "# The cost of durability",
        "",
        f"{model}, 32 x 256 calibration tokens, one thread, start and loading of the model included; share of the "
        f"run's wall time. {machine()}; {software()}. Command: `python -m benchmarks.durability`",
        "",
        *markdown_table(("", *columns), rows),
    ]


if __name__ == "__main__":
    main()
