"""The quality benchmark in words: the page benchmarks/results/quality.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.quality.cells import Row
from benchmarks.quality.methods import DENSE, LEFT_OUT, PUBLISHED, REFERENCE
from benchmarks.quality.parts import CORE, NONE, Study
from benchmarks.quality.sections import (
    ACCURACY,
    PERPLEXITY,
    Line,
    Section,
    number,
    outside_of,
    sections_of,
    studies_of,
)
from benchmarks.quality.texts import FIRST_UNSEEN_DOCUMENT
from benchmarks.reporting import markdown_table

MISSING = "not measured yet"
RULES = (
    "- Learning rates and alpha were chosen on `c4_demo.jsonl`, on documents 0 to "
    f"{FIRST_UNSEEN_DOCUMENT - 1} of `c4_prompts.pf-decoding.jsonl` and on the embedded corpus (`pydocs`). The form of "
    "the default (refinement, then distillation, one epoch of each on 128 samples) follows earlier experiments that "
    "were judged on the start of WikiText-2's test file and of C4; its generated samples do not.",
    "- Calibration reads WikiText-2's validation file; the part `c4` reads the first half of "
    f"`c4_prompts.pf-decoding.jsonl`, documents 0 to {FIRST_UNSEEN_DOCUMENT - 1}.",
    "- Results are reported on WikiText-2's test file and on the second half of `c4_prompts.pf-decoding.jsonl`, "
    f"documents from {FIRST_UNSEEN_DOCUMENT} on.",
)


def markdown(rows: Sequence[Row], picture: str | None = None) -> list[str]:
    """The lines of the whole page; `picture` is the file name of the figure, if there is one."""
    lines = ["# Quality, side by side", "", *_explanation()]
    if rows:
        lines += ["", *_circumstances(rows)]
    if picture is not None:
        lines += ["", f"![perplexity by sparsity and by processor time]({picture})"]
    studies = studies_of(rows)
    for study in studies:
        about = f": {study.model}, {study.calibration}, {study.evaluated}" if len(studies) > 1 else ""
        for section in _shown(sections_of(rows, study)):
            lines += ["", f"## {section.part.title}{about}", "", *_section(section)]
    num_outside = outside_of(rows)
    if num_outside:
        lines += ["", f"{num_outside} rows of quality.csv belong to no part of the plan and are not shown."]
    return lines


def _shown(sections: Sequence[Section]) -> list[Section]:
    """All of the usual study, so that what is missing is seen; of others the parts that were measured."""
    return [one for one in sections if one.study.model == Study().model or one.num_missing < one.num_planned]


def _explanation() -> list[str]:
    return [
        "Perplexity, by lampctl's own evaluation for every method; everything is computed in fp32 unless the method "
        "says otherwise, with one thread a cell unless it says so below. The texts:",
        "",
        *RULES,
        "",
        "Columns:",
        "",
        "- draw: how many calibration windows are skipped at the start of the text. Several draws are given as their "
        "mean (lowest to highest).",
        f'- "of published": the ratio to the mean of {PUBLISHED}, the paper\'s method at the learning rate and epochs '
        f'of docs/benchmark.md; "of {REFERENCE}": to that of lampctl\'s {REFERENCE}. Both on the draws that both have.',
        "- CPU s: processor seconds of the whole call that prunes, mean over draws.",
        "- zeros: counted in the model's files, over the weights of the blocks' linear layers.",
        "- memory: the peak of the process.",
        "",
        "quality.csv has, for each row, the flags, the settings in force, what the run reports of its distillation, "
        "the version of the code and the machine.",
        "",
        "`python -m benchmarks.quality` measures the core table, `--part NAME` another part, `--report` makes this "
        "page and its figure anew from quality.csv (docs/benchmark.md). [quality-0.1.0.md](quality-0.1.0.md) is the "
        "table of version 0.1.0, calibrated on 32 x 256 tokens: its figures do not compare with those here.",
    ]


def _circumstances(rows: Sequence[Row]) -> list[str]:
    def all_of(column: str) -> str:
        return "; ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))

    threads = dict.fromkeys((row["threads"], row["jobs"]) for row in rows)
    loads = ", ".join(f"{t} thread{'s' * (t != '1')} a cell, {j} side by side" for t, j in threads)
    return [
        f"- machine: {all_of('machine')}; {loads}",
        f"- software: {all_of('software')}",
        f"- code: {all_of('code')}",
    ]


def _section(section: Section) -> list[str]:
    grid, study = section.part.grids[0], section.study
    text = "the first half of C4" if grid.is_on_c4 else study.calibration
    windows, _, texts = study.evaluated.partition(" of ")
    how = study.tasks if grid.is_tasks else f"{windows.replace('x', ' x ')} tokens of {texts or 'each text'}"
    lines = [f"{study.model}, calibrated on {grid.num_samples} x {grid.seqlen} tokens of {text}; measured on {how}."]
    if section.num_missing:
        command = "" if section.name == CORE else f" --part {section.name}"
        lines[0] += (
            f" {section.num_missing} of {section.num_planned} cells are {MISSING} "
            f"(`python -m benchmarks.quality{command}`)."
        )
    return [*lines, "", *(_accuracies(section) if section.part.is_tasks else _perplexities(section)), *_notes(section)]


def _perplexities(section: Section) -> list[str]:
    columns = section.columns
    heads = ["at", "method", "draws"]
    for column in columns:
        heads += [column.removeprefix(PERPLEXITY), "of published", f"of {REFERENCE}"]
    heads += ["zeros", "CPU s", "of published", "peak MB"]
    blanks = len(heads) - 3
    rows = [_dense_row(section, [v for c in columns for v in (_one(section.dense, c), NONE, NONE)], blanks)]
    for line in section.lines:
        if not line.rows:
            rows.append([line.point, line.method, MISSING, *(NONE,) * blanks])
            continue
        values = [line.point, line.method, _draws(line)]
        for column in columns:
            ratios = [_ratio(section.ratio(line, method, column)) for method in (PUBLISHED, REFERENCE)]
            values += [_spread(line.values(column)), *ratios]
        memory, cpu = line.values("peak_memory_mb"), line.mean("cpu_seconds")
        values += [
            f"{statistics.mean(line.values('sparsity')):.3%}",
            NONE if cpu is None else f"{cpu:.0f}",
            _ratio(section.ratio(line, PUBLISHED, "cpu_seconds")),
            f"{max(memory):.0f}" if memory else NONE,
        ]
        rows.append(values)
    return markdown_table(heads, rows)


def _accuracies(section: Section) -> list[str]:
    columns = section.columns
    heads = ["at", "method", "draws", *(column.removeprefix(ACCURACY) for column in columns)]
    rows = [_dense_row(section, [_percent(section.dense, column) for column in columns], len(columns))]
    for line in section.lines:
        values = [_percent(line.rows[0], c) for c in columns] if line.rows else [NONE] * len(columns)
        rows.append([line.point, line.method, _draws(line) if line.rows else MISSING, *values])
    return markdown_table(heads, rows)


def _dense_row(section: Section, values: Sequence[str], num_values: int) -> list[str]:
    if section.dense is None:
        return [NONE, DENSE, MISSING, *(NONE,) * num_values]
    return [NONE, DENSE, NONE, *values, *(NONE,) * (num_values - len(values))]


def _notes(section: Section) -> list[str]:
    planned = {method for grid in section.part.grids for method in grid.methods}
    notes = [
        f"- no {method} at {point}: {reason}"
        for (method, point), reason in LEFT_OUT.items()
        if method in planned and any(point in grid.points for grid in section.part.grids)
    ]
    notes += [
        f"- {line.method} at {line.point} breaks the pattern in {1 - held:.2%} of its groups"
        for line in section.lines
        for held in line.values("pattern_held")
        if held < 1
    ]
    return ["", *notes] if notes else []


def _draws(line: Line) -> str:
    measured = ", ".join(line.by_draw)
    return f"{measured} ({', '.join(line.missing)} {MISSING})" if line.missing else measured


def _one(row: Row | None, column: str) -> str:
    return (row or {}).get(column) or NONE


def _percent(row: Row | None, column: str) -> str:
    value = number(row or {}, column)
    return NONE if value is None else f"{100 * value:.1f}%"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"
