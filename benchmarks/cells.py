"""One cell of a benchmark: a whole `lampctl run`, its figures kept in a CSV, the run itself thrown away.

A benchmark that is stopped goes on at the first cell that has no row yet; within a cell, lampctl resumes.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """What to run: a name that is unique in the table, and the flags of `lampctl run`."""

    key: dict[str, str]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join(f"{k}={v}" for k, v in self.key.items()).replace("/", "_")


FIGURES = ("perplexity", "achieved_sparsity", "seconds", "peak_memory_mb")


def run_cells(model: str, cells: list[Cell], table: Path, work: Path) -> list[dict[str, str]]:
    """The rows of `table`, one per cell, after running those that are missing."""
    rows = read_rows(table)
    done = {tuple(row[k] for k in cells[0].key) for row in rows}
    for number, cell in enumerate(cells, 1):
        if tuple(cell.key.values()) in done:
            continue
        run_dir = work / cell.name
        command = [
            sys.executable,
            "-m",
            "lampctl",
            "run",
            model,
            *cell.flags,
            "--run-dir",
            str(run_dir),
            "--json",
        ]
        started = time.monotonic()
        print(f"[{number}/{len(cells)}] {cell.name}", file=sys.stderr, flush=True)
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr}")
        row = {**cell.key, **_figures(json.loads(finished.stdout))}
        rows.append(row)
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*cell.key, *FIGURES], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"    {row['perplexity']} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        shutil.rmtree(run_dir)
    return rows


def read_rows(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def _figures(report: dict) -> dict[str, str]:
    perplexities = {e["which"]: e["perplexity"] for e in report["evaluations"]}
    return {
        "perplexity": f"{perplexities['pruned']:.2f}",
        "achieved_sparsity": f"{report['sparsity']:.6f}",
        "seconds": f"{report['pruning_s']:.0f}",
        "peak_memory_mb": f"{report['peak_memory_bytes'] / 1e6:.0f}",
    }


def as_text_file(path: Path, work: Path) -> Path:
    """`path` itself, or for JSON lines a text file of their documents, joined by blank lines."""
    if path.suffix != ".jsonl":
        return path.resolve()
    documents = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        documents.append(record["text"] if "text" in record else record["prefix"] + record["gold_completion"])
    text = work / f"{path.stem}.txt"
    work.mkdir(parents=True, exist_ok=True)
    text.write_text("\n\n".join(documents), encoding="utf-8")
    return text.resolve()


def machine() -> str:
    """One line about where the figures come from."""
    import torch
    import transformers

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
