"""How fast and how small: the figures of docs/performance.md, measured on this machine.

    python benchmarks/speed.py [--only P1,P6] [--peer-python PYTHON]

Ratios compare two things in one run of this script; each is the best of some repeats, since a machine is only ever
disturbed in one direction. Rows go to benchmarks/results/speed.csv, a table to speed.md, pictures to speed.png and
overlap.png beside them. Measuring a figure again replaces its rows. About an hour and a half on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.performance import runs
from benchmarks.performance.kernels import arithmetic, store
from benchmarks.quality import peers
from benchmarks.reporting import RESULTS, machine, markdown_table, read_rows, software, write_page, write_rows

TABLE = RESULTS / "speed.csv"
COLUMNS = ("figure", "case", "value", "unit", "met", "machine", "software")
Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    title: str
    target: str
    measure: Callable[[Path], list[Row]]


def _arithmetic(work: Path) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for found in arithmetic("smollm2-135m", dtype, work / "arithmetic"):
            case = f"{found['pass']}, {dtype}"
            rows.append({"case": case, "value": found["share"], "unit": "share", "met": found["share"] >= 0.7})
    return rows


def _store(work: Path) -> list[Row]:
    rows = []
    for found in store(work / "store"):
        counts = found["chunk_mb"] >= 4
        for what in ("write", "read"):
            ratio = found[f"{what}_ratio"]
            row = {"case": f"{what}, chunks of {found['chunk_mb']:g} MB", "value": ratio, "unit": "ratio"}
            rows.append({**row, "met": ratio >= 0.8} if counts else row)
            rows.append({"case": f"raw {row['case']}", "value": found[f"raw_{what}_mb_s"], "unit": "MB/s"})
    return rows


def _peer(method: str, target: float) -> Callable[[Path], list[Row]]:
    def measure(work: Path) -> list[Row]:
        python = peers.find(PEER)
        if python is None:
            raise SystemExit("no peer to compare with: make one by `python -m benchmarks.quality.peers`")
        rows = runs.against_peer(work, python, method, repeats=2)
        rows[0]["met"] = rows[0]["value"] <= target
        return rows

    return measure


def _not_hidden(work: Path) -> list[Row]:
    rows, timeline = runs.not_hidden(work)
    from benchmarks.performance.figure import draw_overlap

    draw_overlap(timeline, RESULTS / "overlap.png")
    return rows


_GROWTH: dict[Path, list[Row]] = {}


def _memory(work: Path) -> list[Row]:
    depth, growth_of_depth = runs.memory_of_depth(work, (4, 8, 16, 32))
    samples, growth_of_samples = runs.memory_of_samples(work, (32, 64, 128, 256))
    _GROWTH[work] = [*growth_of_depth, *growth_of_samples]
    return [*depth, *samples]


def _growth(work: Path) -> list[Row]:
    if work not in _GROWTH:
        _memory(work)
    return _GROWTH[work]


PEER: Path | None = None
FIGURES = {
    "P1": Figure("model FLOP over the machine's best rate for these products", "0.70 or more", _arithmetic),
    "P2": Figure("SparseGPT's time over llm-compressor's", "0.33 or less", _peer("sparsegpt", 0.33)),
    "P3": Figure("Wanda's time over llm-compressor's", "0.50 or less", _peer("wanda", 0.5)),
    "P4": Figure("LAMP's time over SparseGPT's", "reported", runs.lamp_against_sparsegpt),
    "P5": Figure("wall time that is not hidden: I/O, fsync, digests, commits", "0.03 or less", _not_hidden),
    "P6": Figure("peak memory by depth and by samples", "flat within 0.05", _memory),
    "P7": Figure("peak memory, two blocks of OPT-6.7B's shape", "the bound", runs.memory_of_a_large_block),
    "P8": Figure("activation store over raw file I/O with fsync", "0.80 or more from 4 MB", _store),
    "P9": Figure("starting, over a bare Python", "1.5 or less", lambda work: runs.starting(work, 15)),
    "P10": Figure("growth of time with depth and tokens", "within 0.05", _growth),
    "P11": Figure("resume: start to first useful compute", "under 5 s", lambda work: runs.resuming(work, 5)),
    "P12": Figure(
        "peak memory of distillation by depth, one block in memory",
        "flat within 0.05",
        lambda work: runs.memory_of_distillation(work, (4, 8, 16, 32)),
    ),
}


def main() -> None:
    global PEER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(FIGURES), metavar="P1,...")
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="room for runs, on the disk to measure")
    args = parser.parse_args()
    PEER = args.peer_python
    wanted = [name.strip() for name in args.only.split(",")]
    unknown = [name for name in wanted if name not in FIGURES]
    if unknown:
        parser.error(f"{unknown[0]} is no figure; there are {', '.join(FIGURES)}")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        print(f"{name}: {FIGURES[name].title} ...", file=sys.stderr, flush=True)
        put(name, FIGURES[name].measure(work))
    rows = read()
    write_page(RESULTS / "speed.md", markdown(rows))
    from benchmarks.performance.figure import draw

    draw(rows, RESULTS / "speed.png")


def read() -> list[Row]:
    """All rows so far."""
    return read_rows(TABLE)


def put(figure: str, measured: list[Row]) -> None:
    """Replace a figure's rows."""
    circumstances = {"figure": figure, "machine": machine(), "software": software()}
    new = [{"met": "", **row, **circumstances, "value": f"{row['value']:.4g}"} for row in measured]
    rows = [row for row in read() if row["figure"] != figure] + new
    rows.sort(key=lambda row: [*FIGURES].index(row["figure"]))
    write_rows(TABLE, COLUMNS, rows)


def markdown(rows: list[Row]) -> list[str]:
    """The table: a line a case, with what was to be reached."""
    lines = [
        "# Speed and memory",
        "",
        "Command: `python benchmarks/speed.py` (`make bench-speed`). Ratios are of two measurements in one run; "
        "each time is the best of its repeats.",
    ]
    for circumstances in dict.fromkeys((row["machine"], row["software"]) for row in rows):
        figures = dict.fromkeys(r["figure"] for r in rows if (r["machine"], r["software"]) == circumstances)
        lines += ["", f"{', '.join(figures)}: {circumstances[0]}; {circumstances[1]}."]
    cells, previous = [], ""
    for row in rows:
        figure = FIGURES[row["figure"]]
        head = (row["figure"], figure.title, figure.target) if row["figure"] != previous else ("", "", "")
        previous = row["figure"]
        verdict = {"True": "reached", "False": "missed"}.get(row["met"], "")
        cells.append((*head, row["case"], shown(row), verdict))
    return [*lines, "", *markdown_table(("", "figure", "to reach", "case", "measured", ""), cells)]


def shown(row: Row) -> str:
    """A value with its unit."""
    value = float(row["value"])
    if row["unit"] == "share":
        return f"{100 * value:.1f}%"
    digits = 2 if row["unit"] in ("ratio", "s") else 0
    return f"{value:.{digits}f}" + ("" if row["unit"] == "ratio" else f" {row['unit']}")


if __name__ == "__main__":
    main()
