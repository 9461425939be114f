"""What it costs that no crash can undo a step: the share of a run's wall time, SmolLM2-135M.

    python benchmarks/durability.py

Runs `lampctl run` twice, by SparseGPT (little work for each byte written: the worst case) and by LAMP, each with a stop
watch around every flush, every digest, every record and every deletion, and writes benchmarks/results/durability.md.
What a thread does while another one computes is counted too, so the shares are upper bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cells import machine, software

RESULTS = Path(__file__).parent / "results"
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


class StopWatch:
    """Seconds by kind; what one timed function spends in another counts for the inner one alone."""

    def __init__(self, *, main_only: bool = False) -> None:
        """main_only: what other threads do is not counted."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._main_only = main_only
        self._lock = threading.Lock()
        self._inner = threading.local()

    @contextlib.contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        if self._main_only and threading.current_thread() is not threading.main_thread():
            yield
            return
        outer_inner = getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self.seconds[kind] += elapsed - self._inner.seconds
            self._inner.seconds = outer_inner + elapsed

    def around(self, owner: Any, name: str, kind: str) -> None:
        """Time every call of `owner.name`."""
        function: Callable = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(kind):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def run_one(arguments: list[str], report: Path) -> None:
    """`lampctl` with these arguments in this process; its seconds go to `report`."""
    start = time.perf_counter()
    watch = StopWatch()
    watch_durability(watch)
    run_lampctl(arguments)
    report.write_text(json.dumps({"wall": time.perf_counter() - start, "seconds": watch.seconds}))


def run_lampctl(arguments: list[str]) -> None:
    """The command line in this process. Raises SystemExit if it fails."""
    from lampctl import app

    sys.argv = ["lampctl", *arguments]
    try:
        app.main()
    except SystemExit as end:
        if end.code:
            raise


def watch_durability(watch: StopWatch) -> None:
    """Have everything that makes a run durable timed."""
    from pipeline.engine import repair
    from pipeline.rundir import filesystem, run_directory

    class Hash:
        """hashlib.sha256, timed."""

        def __init__(self, data: Any = b"") -> None:
            with watch.timing("digest"):
                self._hash = sha256(data)

        def update(self, data: Any) -> None:
            with watch.timing("digest"):
                self._hash.update(data)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    class Hashes:
        """In place of the module hashlib, where files are written and read."""

        sha256 = Hash

    sha256 = filesystem.hashlib.sha256
    filesystem.hashlib = Hashes  # type: ignore[assignment]
    watch.around(filesystem, "digest_file", "digest")
    watch.around(filesystem.Calls, "flush", "flush")
    for name in ("commit", "create", "publish", "write_view", "event"):
        watch.around(run_directory.RunDirectory, name, "record")
    for name in ("release", "clean"):
        watch.around(run_directory.RunDirectory, name, "tidy")
    watch.around(repair, "damaged_payloads", "check")


def measure(name: str, model: str, work: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    report = work / "report.json"
    arguments = ["run", model, *RUNS[name], *COMMON, "--run-dir", str(work / "run")]
    command = [sys.executable, __file__, "--inside", str(report), "--", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            columns[name] = measure(name, args.model, Path(folder))
    text = markdown(args.model, columns)
    print(text)
    (RESULTS / "durability.md").write_text(text, encoding="utf-8")


def markdown(model: str, columns: dict[str, dict[str, Any]]) -> str:
    """A table: a row a kind, a column a run."""

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> str:
        return f"| {label} | " + " | ".join(value(column) for column in columns.values()) + " |"

    def share(column: dict[str, Any], seconds: float) -> str:
        return f"{100 * seconds / column['wall']:.2f}%"

    return "\n".join(
        [
            "# The cost of durability",
            "",
            f"{model}, 32 x 256 calibration tokens, one thread, start and loading of the model included; share of the "
            f"run's wall time. {machine()}; {software()}. Command: `python benchmarks/durability.py`",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
            *(row(text, lambda c, k=kind: share(c, c["seconds"].get(k, 0.0))) for kind, text in KINDS.items()),
            row("together", lambda c: share(c, sum(c["seconds"].values()))),
            row("wall time, s", lambda c: f"{c['wall']:.0f}"),
            "",
        ]
    )


if __name__ == "__main__":
    main()
