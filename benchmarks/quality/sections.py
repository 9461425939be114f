"""The rows of the quality benchmark put beside its plan: what was measured of each part, and what was not yet."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality.cells import UNKNOWN, Row
from benchmarks.quality.methods import CURVE, DENSE, MAGNITUDE, ORDER, POINTS
from benchmarks.quality.parts import KEY, NONE, PARTS, Part, Study
from benchmarks.quality.texts import C4_FIRST

PERPLEXITY, ACCURACY = "perplexity_", "acc_"


@dataclass(frozen=True)
class Line:
    """All draws of one method at one point, planned and measured."""

    point: str
    method: str
    draws: tuple[str, ...]  # as planned
    rows: tuple[Row, ...]  # those that were measured, in the order of the plan

    @property
    def by_draw(self) -> dict[str, Row]:
        return {row["draw"]: row for row in self.rows}

    @property
    def missing(self) -> list[str]:
        """Draws that were not measured yet."""
        return [draw for draw in self.draws if draw not in self.by_draw]

    def values(self, column: str) -> list[float]:
        """One a measured draw; nothing for a draw whose value is not known."""
        return [value for row in self.rows if (value := number(row, column)) is not None]

    def mean(self, column: str) -> float | None:
        """The mean over the measured draws."""
        values = self.values(column)
        return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Section:
    """One part of one study.

    Attributes:
        name: Of the part.
        dense: The row of the original model.
        columns: Those of its figures: perplexities of texts, or accuracies of tasks.
        lines: By point, then method.
        num_planned: Cells of the part.
        num_missing: Those that were not measured yet.
        beside: All that was measured on the same calibration tokens, whatever part it belongs to.
    """

    name: str
    part: Part
    study: Study
    dense: Row | None
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    num_planned: int
    num_missing: int
    beside: tuple[Line, ...]

    @property
    def points(self) -> list[str]:
        return list(dict.fromkeys(line.point for line in self.lines))

    def line(self, point: str, method: str) -> Line | None:
        """What was measured of a method at a point; None: nothing."""
        return next((one for one in self.beside if (one.point, one.method) == (point, method)), None)

    def ratio(self, line: Line, method: str, column: str) -> float | None:
        """Mean of a column over that of `method`, on the draws that both have; None: there are none."""
        reference = self.line(line.point, method)
        if reference is None:
            return None
        pairs = []
        for draw, row in reference.by_draw.items():
            mine = line.rows[0] if line.rows and line.method == MAGNITUDE else line.by_draw.get(draw)
            pair = (number(mine, column) if mine else None, number(row, column))
            if None not in pair:
                pairs.append(pair)
        if not pairs:
            return None
        own, others = zip(*pairs, strict=True)
        return statistics.mean(own) / statistics.mean(others)


def studies_of(rows: Sequence[Row]) -> list[Study]:
    """What the rows belong to; the benchmark's usual study if there are no rows."""
    default = Study()
    task_labels = {row["model"]: row["evaluated"] for row in rows if _is_of_tasks(row)}
    measured = [row for row in rows if not _is_of_tasks(row)]
    groups = dict.fromkeys(
        (row["model"], row["evaluated"], row["calibration"])
        for row in measured
        if row["calibration"] not in (NONE, C4_FIRST)
    )
    known = {(model, evaluated) for model, evaluated, _ in groups}
    for row in measured:
        if (row["model"], row["evaluated"]) not in known:
            groups[row["model"], row["evaluated"], default.calibration] = None
    if not groups:
        groups[default.model, default.evaluated, default.calibration] = None
    return [
        Study(model, evaluated, task_labels.get(model, default.tasks), calibration)
        for model, evaluated, calibration in groups
    ]


def sections_of(rows: Sequence[Row], study: Study) -> list[Section]:
    """Every part of the study, measured or not."""
    by_key = {_values(row): row for row in rows}
    lines_of = {name: _lines(study.keys(part), by_key) for name, part in PARTS.items()}
    dense_of = {key["evaluated"]: by_key.get(_values(key)) for key in study.dense_keys()}
    sections = []
    for name, part in PARTS.items():
        amount, keys = _amount(part, study), study.keys(part)
        beside: dict[tuple[str, str], Line] = {}
        for one in (line for other in PARTS if _amount(PARTS[other], study) == amount for line in lines_of[other]):
            known = beside.get((one.point, one.method))
            if one.rows and (known is None or len(one.rows) > len(known.rows)):  # the one with most draws
                beside[one.point, one.method] = one
        alike = [r for r in rows if (r["model"], r["evaluated"]) == (study.model, study.evaluated_of(part))]
        sections.append(
            Section(
                name=name,
                part=part,
                study=study,
                dense=dense_of[study.evaluated_of(part)],
                columns=_columns(alike, ACCURACY if part.is_tasks else PERPLEXITY),
                lines=lines_of[name],
                num_planned=len(keys),
                num_missing=sum(_values(key) not in by_key for key in keys),
                beside=tuple(beside.values()),
            )
        )
    return sections


def outside_of(rows: Sequence[Row]) -> int:
    """How many rows belong to no part of any study."""
    planned = {_values(key) for study in studies_of(rows) for part in PARTS.values() for key in study.keys(part)}
    return sum(_values(row) not in planned for row in rows)


def frontier(lines: Sequence[Line], column: str) -> list[tuple[Line, bool]]:
    """By processor time, of which other work on the machine takes nothing; True: no faster method is as good.

    Methods whose time is not known are left out, and so is magnitude: it looks at no data.
    """
    timed = [
        (cpu, value, line)
        for line in lines
        if line.method != MAGNITUDE
        and (cpu := line.mean("cpu_seconds")) is not None
        and (value := line.mean(column)) is not None
    ]
    best, result = float("inf"), []
    for _, value, line in sorted(timed, key=lambda each: each[:2]):
        result.append((line, value < best))
        best = min(best, value)
    return result


def curve(section: Section, column: str) -> list[tuple[int, float]]:
    """Number of samples that ours was distilled on, and the mean of a column."""
    means = {CURVE[one.method]: one.mean(column) for one in section.lines if one.method in CURVE}
    return sorted((count, mean) for count, mean in means.items() if mean is not None)


def number(row: Row, column: str) -> float | None:
    """The value of a column; None where it is not known."""
    value = row.get(column)
    return None if value in (None, "", UNKNOWN) else float(value)


def _lines(keys: Sequence[Row], by_key: dict[tuple[str, ...], Row]) -> tuple[Line, ...]:
    """What is planned and measured of every method but the dense model."""
    planned: dict[tuple[str, str], list[Row]] = {}
    for key in keys:
        if key["method"] != DENSE:
            planned.setdefault((key["point"], key["method"]), []).append(key)
    lines = []
    for point, method in sorted(planned, key=_place):
        mine = planned[point, method]
        rows = tuple(by_key[_values(key)] for key in mine if _values(key) in by_key)
        lines.append(Line(point, method, tuple(key["draw"] for key in mine), rows))
    return tuple(lines)


def _values(row: Row) -> tuple[str, ...]:
    """The columns that name a row."""
    return tuple(row[name] for name in KEY)


def _place(of: tuple[str, str]) -> tuple[int, int]:
    point, method = of
    return list(POINTS).index(point), ORDER.index(method)


def _amount(part: Part, study: Study) -> tuple[object, ...]:
    grid = part.grids[0]
    return (grid.is_on_c4, grid.num_samples, grid.seqlen, study.evaluated_of(part))


def _columns(rows: Sequence[Row], prefix: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix) and row[name]))


def _is_of_tasks(row: Row) -> bool:
    return bool(row.get(f"{ACCURACY}mean"))
