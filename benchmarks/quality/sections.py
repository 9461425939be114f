"""The quality benchmark's table in words: means over draws, ratios to our SparseGPT, quality against seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality.cells import Row
from benchmarks.quality.plan import DENSE, LAMPS, LEFT_OUT, MAGNITUDE, NONE, ORDER, PEERS, POINTS, REFERENCE
from benchmarks.reporting import markdown_table

_PREFIX = "perplexity_"


@dataclass(frozen=True)
class Line:
    """All draws of one method at one point."""

    point: str
    method: str
    rows: tuple[Row, ...]

    @property
    def draws(self) -> dict[str, Row]:
        return {row["draw"]: row for row in self.rows}

    @property
    def seconds(self) -> float:
        """Median over draws."""
        return statistics.median(float(row["seconds"]) for row in self.rows)

    @property
    def cpu_seconds(self) -> float | None:
        """Median over draws; None if it is not known of all."""
        values = [row.get("cpu_seconds") for row in self.rows]
        return statistics.median(map(float, values)) if all(v not in (None, "", NONE) for v in values) else None

    @property
    def peak_memory_mb(self) -> float:
        return max(float(row["peak_memory_mb"]) for row in self.rows)

    def perplexities(self, text: str) -> list[float]:
        return [float(row[_PREFIX + text]) for row in self.rows if row.get(_PREFIX + text)]

    def mean(self, text: str) -> float | None:
        values = self.perplexities(text)
        return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Section:
    """What may be compared: one model, one amount of calibration, one evaluation."""

    title: str
    texts: tuple[str, ...]
    dense: Row | None
    lines: tuple[Line, ...]  # by point, then method

    def at(self, point: str) -> list[Line]:
        return [line for line in self.lines if line.point == point]

    @property
    def points(self) -> list[str]:
        return list(dict.fromkeys(line.point for line in self.lines))


def sections_of(rows: Sequence[Row]) -> list[Section]:
    """The rows put together; those that looked at no calibration text stand in every section of their model."""
    groups = dict.fromkeys(
        (r["model"], r["evaluated"], r["calibration"], r["num_samples"], r["seqlen"])
        for r in rows
        if r["calibration"] != NONE
    )
    sections = []
    for model, evaluated, calibration, num_samples, seqlen in groups:
        same_model = [r for r in rows if (r["model"], r["evaluated"]) == (model, evaluated)]
        mine = [
            r
            for r in same_model
            if r["calibration"] == NONE
            or (r["calibration"], r["num_samples"], r["seqlen"]) == (calibration, num_samples, seqlen)
        ]
        names = [*ORDER, *sorted({r["method"] for r in mine} - set(ORDER))]
        points = [p for p in POINTS if any(r["point"] == p and r["calibration"] != NONE for r in mine)]
        lines = []
        for point in points:
            for method in names:
                found = tuple(r for r in mine if (r["point"], r["method"]) == (point, method))
                if found:
                    lines.append(Line(point, method, tuple(sorted(found, key=_draw_number))))
        texts = tuple(k.removeprefix(_PREFIX) for k in rows[0] if k.startswith(_PREFIX) and any(r.get(k) for r in mine))
        title = f"{model}, calibrated on {num_samples} x {seqlen} tokens of {calibration}"
        dense = next((r for r in mine if r["method"] == DENSE), None)
        sections.append(Section(title, texts, dense, tuple(lines)))
    return sections


def ratio_to_reference(section: Section, line: Line, text: str) -> float | None:
    """Mean perplexity over that of our SparseGPT, on the draws that both have; None if there is none."""
    reference = next((other for other in section.at(line.point) if other.method == REFERENCE), None)
    if reference is None:
        return None
    column = _PREFIX + text
    shared = [d for d in reference.draws if d in line.draws or line.method == MAGNITUDE]
    mine = [line.draws.get(d, line.rows[0]).get(column) for d in shared]
    theirs = [reference.draws[d].get(column) for d in shared]
    if not shared or not all(mine) or not all(theirs):
        return None
    return statistics.mean(map(float, mine)) / statistics.mean(map(float, theirs))


def frontier(lines: Sequence[Line], text: str) -> list[tuple[Line, bool]]:
    """By processor time, of which other work on the machine takes nothing; True: no faster method is as good.

    Methods whose time is not known are left out, and so is magnitude: it looks at no data.
    """
    timed = [
        (line.cpu_seconds, value, line)
        for line in lines
        if line.method != MAGNITUDE and line.cpu_seconds is not None and (value := line.mean(text)) is not None
    ]
    best, result = float("inf"), []
    for _, value, line in sorted(timed, key=lambda each: each[:2]):
        result.append((line, value < best))
        best = min(best, value)
    return result


def has_efforts(lines: Sequence[Line]) -> bool:
    """Whether there is more than one LAMP to weigh against its seconds."""
    return sum(line.method in LAMPS for line in lines) > 1


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of the whole report."""
    lines = ["# Quality, side by side", "", *_circumstances(rows)]
    for section in sections_of(rows):
        lines += ["", f"## {section.title}", "", *_table(section), *_missing(section), *_frontiers(section)]
    return lines


def _circumstances(rows: Sequence[Row]) -> list[str]:
    def all_of(column: str) -> str:
        return "; ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))

    threads = dict.fromkeys((row["threads"], row["jobs"]) for row in rows)
    loads = ", ".join(f"{t} thread{'s' * (t != '1')} a cell, {j} side by side" for t, j in threads)
    evaluated = ", ".join(dict.fromkeys(row["evaluated"] for row in rows))
    return [
        f"Perplexity on the first {evaluated} tokens of each text, by lampctl's own evaluation for every method. A "
        "draw is the number of windows left out at the calibration text's start; more draws than one are given as mean "
        f'(least to most). "of {REFERENCE}": the mean over that of lampctl\'s SparseGPT on the same draws. Sparsity: '
        "zeros counted in the model's files, over the weights of the blocks' linear layers. Seconds: from reading "
        "the model to having written the pruned one, without evaluation, median over draws; they grow with whatever "
        "else the machine does, CPU s (processor time of the whole call that prunes, median) do so hardly. Memory: "
        "the process's peak.",
        "",
        f"- machine: {all_of('machine')}; {loads}",
        f"- software: {all_of('software')}",
        "- commands: `python -m benchmarks.quality.peers`, then `python -m benchmarks.quality` (all of it; `--quick`: "
        "the 32 x 256 part); `--report` makes this page and its figure anew from quality.csv",
        "",
        "![perplexity by sparsity and by pattern](quality.png)",
    ]


def _table(section: Section) -> list[str]:
    heads = ["at", "method", "draws"]
    for text in section.texts:
        heads += [text, f"of {REFERENCE}"]
    heads += ["sparsity", "seconds", "CPU s", "peak MB"]
    rows = []
    if section.dense is not None:
        values = [NONE, DENSE, NONE]
        for text in section.texts:
            values += [section.dense.get(_PREFIX + text) or NONE, NONE]
        rows.append([*values, *(NONE,) * 4])
    for line in section.lines:
        values = [line.point, line.method, ", ".join(line.draws)]
        for text in section.texts:
            ratio = ratio_to_reference(section, line, text)
            values += [_spread(line.perplexities(text)), NONE if ratio is None else f"{ratio:.2f}"]
        sparsity = statistics.mean(float(row["sparsity"]) for row in line.rows)
        cpu = NONE if line.cpu_seconds is None else f"{line.cpu_seconds:.0f}"
        values += [f"{sparsity:.3%}", f"{line.seconds:.0f}", cpu, f"{line.peak_memory_mb:.0f}"]
        rows.append(values)
    return markdown_table(heads, rows)


def _missing(section: Section) -> list[str]:
    notes = []
    for (method, point), reason in LEFT_OUT.items():
        if point in section.points:
            notes.append(f"- no {method} at {point}: {reason}")
    broken = [
        f"- {line.method} at {line.point} breaks the pattern in {1 - float(row['pattern_held']):.2%} of its groups"
        for line in section.lines
        for row in line.rows
        if row.get("pattern_held") not in (None, "", NONE) and float(row["pattern_held"]) < 1
    ]
    if not any(line.method in PEERS for line in section.lines):
        notes.append("- the peers were not measured here")
    return ["", *notes, *broken] if notes or broken else []


def _frontiers(section: Section) -> list[str]:
    lines = []
    for point in section.points:
        if not has_efforts(section.at(point)):
            continue
        text = section.texts[0]
        lines += ["", f"### Perplexity on {text} for processor time, at {point}", ""]
        lines += markdown_table(
            ("CPU s", "method", text, "best for its time"),
            [
                (f"{line.cpu_seconds:.0f}", line.method, f"{line.mean(text):.1f}", "yes" if is_best else "")
                for line, is_best in frontier(section.at(point), text)
            ],
        )
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def _draw_number(row: Row) -> int:
    return int(row["draw"]) if row["draw"] != NONE else 0
