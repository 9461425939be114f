"""What benchmarks write: Markdown tables, CSV files of rows, pictures, and where it was measured."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table.

    Args:
        heads: one text per column.
        rows: one cell per column each.
    """
    return [_table_line(heads), "|" + "---|" * len(heads), *(_table_line(row) for row in rows)]


def _table_line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write a Markdown page and print it."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, completely or not at all, and close it."""
    from matplotlib import pyplot

    unfinished = path.with_name(f"{path.stem}.unfinished.png")
    figure.savefig(unfinished, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    unfinished.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file, completely or not at all. Columns that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".csv.unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, so that processes change its files one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def machine() -> str:
    """Model name of the processor and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def software() -> str:
    """Versions that decide the numbers of a lampctl run."""
    from stages.version import VERSION

    versions = [
        f"lampctl {VERSION}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")),
    ]
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        is_changed = bool(_git("status", "--porcelain", "--", "lampctl", "pipeline", "stages"))
        versions[0] += f" ({commit}{' and changes' if is_changed else ''})"
    return ", ".join([*versions, f"Python {platform.python_version()}"])


def code_version() -> str:
    """Commit of this checkout, with "+changes" if any file but the results differs from it; empty without git."""
    commit = _git("rev-parse", "--short", "HEAD")
    is_changed = commit and _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}+changes" if is_changed else commit


def _git(*words: str) -> str:
    """Output of git in this checkout; empty if git fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
