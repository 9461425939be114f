"""Cells of a benchmark: commands to run, one row of figures each, kept in a CSV; what the commands made is thrown away.

A benchmark that is stopped resumes at the first cell that has no row yet; within a cell, lampctl resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.ledger import Ledger
from benchmarks.reporting import code_version, locked, machine, read_rows, software, write_rows

Row = dict[str, str]
# Of the rows, beside a cell's own columns: how and where they were measured.
CIRCUMSTANCES = ("threads", "jobs", "settings", "resolved", "reported", "code", "software", "machine")
UNKNOWN = "-"


@dataclass(frozen=True)
class Cell:
    """What to run, and which row comes of it."""

    key: Row  # the columns that name the row
    settings: str  # what else decides the figures: a row that was measured with others is measured again
    folder: Path  # where the commands work; removed when the row is written
    commands: tuple[tuple[str, ...], ...]  # each prints JSON
    figures: Callable[[list[dict]], Row]  # from what they printed, in their order
    wanted: tuple[str, ...] = ()  # figures without which a row does not count
    resumes: bool = False  # whether the commands continue with what they find in the folder
    kept_for: tuple[Row, ...] = ()  # keys of rows that need the folder, too: it stays until the table has them

    @property
    def name(self) -> str:
        return " ".join(self.key.values())


def folder_for(key: Row, settings: str, work: Path) -> Path:
    """A folder that belongs to this key and these settings: a run with other settings is not resumed."""
    name = re.sub(r"[^\w.%-]+", "_", " ".join(key.values()))
    return work / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


def run_command(model: str, flags: Sequence[str], run_dir: Path) -> tuple[str, ...]:
    """A whole `lampctl run` of this environment's Python."""
    return (sys.executable, "-m", "lampctl", "run", model, *flags, "--run-dir", str(run_dir), "--json")


class Table:
    """The rows of a benchmark, in a CSV file that is written whole or not at all."""

    def __init__(self, path: Path, key_columns: Sequence[str]) -> None:
        self.path, self._key_columns = path, tuple(key_columns)

    def rows(self) -> list[Row]:
        """All rows. Those of another benchmark's columns do not count."""
        return [row for row in read_rows(self.path) if all(row.get(column) for column in self._key_columns)]

    def has(self, cell: Cell, rows: Sequence[Row]) -> bool:
        """Whether one of `rows` is this cell's, measured with these settings, and complete."""
        return any(
            self._names(row, cell.key)
            and (row.get("settings") or "") == cell.settings
            and all(row.get(name) for name in cell.wanted)
            for row in rows
        )

    def has_row(self, key: Row) -> bool:
        """Whether there is a row of this key, with whatever settings."""
        return any(self._names(row, key) for row in self.rows())

    def put(self, key: Row, row: Row) -> None:
        """Add a row, in place of an older one of the same key. Other processes may do so at the same time."""
        with locked(self.path.parent):
            rows = self.rows()
            at = next((i for i, old in enumerate(rows) if self._names(old, key)), len(rows))
            rows[at : at + 1] = [row]
            columns = dict.fromkeys(name for each in (*rows, row) for name in each)
            ordered = [name for name in columns if name not in CIRCUMSTANCES] + [*CIRCUMSTANCES]
            write_rows(self.path, ordered, rows)

    def _names(self, row: Row, key: Row) -> bool:
        return all(row.get(column) == key[column] for column in self._key_columns)


def run_cells(cells: Sequence[Cell], table: Table, jobs: int = 1, threads: int = 1) -> list[str]:
    """Run the cells that have no row yet, `jobs` side by side. Returns the names of those that failed.

    A failed cell is reported and skipped; its files stay in its folder.
    """
    missing = [cell for cell in cells if not table.has(cell, table.rows())]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are done", file=sys.stderr, flush=True)
    processes = _Processes(threads)
    failed = []

    def work(number: int, cell: Cell) -> None:
        if processes.is_stopping:
            return
        started = time.monotonic()
        print(f"[{number}/{len(missing)}] {cell.name}", file=sys.stderr, flush=True)
        if not cell.resumes:
            shutil.rmtree(cell.folder, ignore_errors=True)
        ledger = Ledger(cell.folder)
        try:
            reports = [processes.run(command, ledger) for command in cell.commands]
        except _CommandError as error:
            if processes.is_stopping:
                return
            failed.append(cell.name)
            print(f"[{number}/{len(missing)}] {cell.name} FAILED\n{error}", file=sys.stderr, flush=True)
            return
        figures = cell.figures(reports)
        row = {**cell.key, **figures, "threads": str(threads), "jobs": str(jobs)}
        row |= {"settings": cell.settings, "code": ledger.code, "machine": machine()}
        row["software"] = figures.get("software") or software()
        table.put(cell.key, row)
        if all(map(table.has_row, cell.kept_for)):
            shutil.rmtree(cell.folder, ignore_errors=True)
        shown = ", ".join(f"{k} {v}" for k, v in figures.items() if k.startswith(("perplexity", "acc_mean")))
        took = time.monotonic() - started
        print(f"[{number}/{len(missing)}] {cell.name}: {shown} in {took:.0f} s", file=sys.stderr, flush=True)

    with processes.stopped_with_us(), ThreadPoolExecutor(jobs) as pool:
        submitted = [pool.submit(work, number, cell) for number, cell in enumerate(missing, 1)]
        # An error of the benchmark's own ends it at once, not when the last cell is done.
        ended, others = wait(submitted, return_when=FIRST_EXCEPTION)
        for cell_to_come in others:
            cell_to_come.cancel()
        for done in ended:
            done.result()
    return failed


def show_commands(cells: Sequence[Cell], table: Table) -> None:
    """Print what `run_cells` would run."""
    rows = table.rows()
    num_done = sum(table.has(cell, rows) for cell in cells)
    print(f"{num_done} of {len(cells)} cells are done", file=sys.stderr)
    for cell in cells:
        print(f"# {cell.name}" + (": done" if table.has(cell, rows) else ""))
        for command in () if table.has(cell, rows) else cell.commands:
            print(shlex.join(command))


class _CommandError(Exception):
    """A command failed: what it was, and the end of what it said."""


class _Processes:
    """Child processes with the given number of threads each, which end with this process."""

    def __init__(self, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._environment = {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
        self._running: set[int] = set()
        self._lock, self.is_stopping = threading.Lock(), False

    def run(self, command: Sequence[str], ledger: Ledger) -> dict:
        """What the command printed, and `cpu_s`, the processor seconds of all its calls; None: not known."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with self._lock:
                if self.is_stopping:
                    raise _CommandError("stopped before it began")
                ledger.begin(command, code_version())
                child = subprocess.Popen(command, stdout=out, stderr=err, env=self._environment)
                self._running.add(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
            with self._lock:
                self._running.discard(child.pid)
            ledger.end(command, usage.ru_utime + usage.ru_stime)
            child.returncode = os.waitstatus_to_exitcode(status)
            texts = [file.seek(0) or file.read() for file in (out, err)]
        if child.returncode:
            raise _CommandError(f"{shlex.join(command)}\nexit code {child.returncode}\n{texts[1][-4000:]}")
        try:
            report = json.loads(texts[0])
        except json.JSONDecodeError:  # others' programs talk before they come to the point
            report = json.loads(texts[0].splitlines()[-1])
        return {**report, "cpu_s": ledger.cpu_s(command)}

    @contextlib.contextmanager
    def stopped_with_us(self) -> Iterator[None]:
        """Inside, SIGTERM and Ctrl-C end the children, which keep their committed steps."""

        def stop(number: int, _frame: object) -> None:
            with self._lock:
                self.is_stopping = True
                for pid in self._running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            raise SystemExit(128 + number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def figures_of_run(report: dict) -> Row:
    """What a `lampctl run` took: seconds and peak memory of pruning, and processor time of all of it."""
    return {
        "seconds": f"{report['pruning_s']:.0f}",
        "cpu_seconds": UNKNOWN if report["cpu_s"] is None else f"{report['cpu_s']:.0f}",
        "peak_memory_mb": f"{report['peak_memory_bytes'] / 1e6:.0f}",
    }
