"""Contents of the report: figures, tables and texts of each run, in order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lampctl.output.comparison import Comparison
from lampctl.output.labels import source_label
from lampctl.output.units import duration, size
from lampctl.report import data, plots
from lampctl.report.data import Dataset
from lampctl.report.mask_samples import MaskSample
from lampctl.report.masks import mask_gallery
from lampctl.report.page import Paragraph, Part, Picture, Section, Table, Texts, Tiles
from pipeline.rundir.redact import scrub, scrub_values
from pipeline.runs.continuations import Continuation
from pipeline.runs.status import EvaluationResult, RunStatus, described, side_by_side
from stages.metrics.registry import metric_of, recorded_text
from stages.pruners.registry import method_title
from stages.training.loss import LOSSES


@dataclass(frozen=True)
class RunReport:
    """One run: its state, its environment and samples of its model's answers."""

    state: RunStatus
    created: str  # the day
    model: str  # name and revision
    environment: dict[str, str]  # versions, device
    continuations: tuple[Continuation, ...] = ()
    masks: tuple[MaskSample, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the run directory's path."""
        return self.state.label.rstrip("/").rpartition("/")[2] or self.state.label


def heading(runs: Sequence[RunReport]) -> tuple[str, str]:
    """Title and subtitle of the page."""
    first = runs[0].state
    if len(runs) == 1:
        title = f"{Path(first.config.model).name}: {method_title(first.config.method)} at {first.goal}"
        return title, scrub(f"{first.label}, begun {runs[0].created}")
    models = list(dict.fromkeys(Path(run.state.config.model).name for run in runs))
    return f"{', '.join(models)}: {len(runs)} pruning runs", scrub(", ".join(run.name for run in runs))


def contents(runs: Sequence[RunReport], comparison: Comparison) -> tuple[Section, ...]:
    """All sections of the page."""
    several = len(runs) > 1
    names = _distinct_names(runs)
    sections = [_results(runs, comparison)]
    if several:
        sections += _measured([run.state for run in runs])
    sections += _samples(runs, names)
    sections += _masks(runs, names)
    for run, name in zip(runs, names, strict=True):
        parts = _figures_of(run.state, f"{name}-" if several else "")
        if several:
            about = f"{method_title(run.state.config.method)} at {run.state.goal}. {_how_far(run.state)}"
            sections.append(Section(f"run-{name}", name, (Paragraph(about),)))
        sections += [
            Section(f"{anchor}-{name}" if several else anchor, title, found, 3 if several else 2)
            for anchor, title, found in parts
        ]
    sections.append(_settings(runs, names))
    return tuple(sections)


def pictures(sections: Sequence[Section]) -> list[Picture]:
    """All pictures of these sections."""
    return [part for section in sections for part in section.parts if isinstance(part, Picture)]


def _results(runs: Sequence[RunReport], comparison: Comparison) -> Section:
    parts: list[Part] = []
    if len(runs) == 1:
        parts.append(_tiles(runs[0].state))
        parts.append(Paragraph(_how_far(runs[0].state)))
    rows = tuple(
        (
            scrub(row.name),
            row.what,
            *(comparison.cell(row, column).replace(" (", "\n(") for column in comparison.columns),
        )
        for row in comparison.rows
    )
    columns = ("run", "method", *(column.title for column in comparison.columns))
    parts.append(Table(columns, rows, num_labels=2))
    if any(row.values for row in comparison.rows[1:]):
        parts.append(Paragraph(f"In brackets: the difference from {scrub(comparison.rows[0].name)}."))
    return Section("results", "Results", tuple(parts))


def _how_far(state: RunStatus) -> str:
    if state.is_finished:
        return f"Finished: {len(state.steps)} steps in {duration(state.elapsed_s)}."
    return (
        f"{state.num_done} of {len(state.steps)} steps are done; next: {state.next_step}. "
        "What is not there yet is left out."
    )


def _tiles(state: RunStatus) -> Tiles:
    tiles = []
    for pair in side_by_side(state.evaluations):
        if "pruned" in pair:
            found = pair["pruned"]
            remark = f"dense {_value_of(pair['dense'])}" if "dense" in pair else described(found)
            partial = ", part of it" if found.is_partial else ""
            title = f"{metric_of(found.metric).title}, {source_label(found.source)}{partial}"
            tiles.append((title, _value_of(found), remark))
    if state.end_loss is not None:
        tiles.append((state.end_loss.title, state.end_loss.text, state.end_loss.measured_on))
    if state.sparsity is not None:
        count = f"{state.num_masked:,} of {state.num_prunable:,} weights"
        tiles.append(("sparsity achieved", f"{100 * state.sparsity:.4f}%", count))
    tiles.append(("pruning time", duration(state.pruning_s), "without evaluation"))
    if state.peak_device_bytes is not None:
        tiles.append(("peak memory", size(state.peak_device_bytes), "of the GPU"))
    elif state.peak_memory_bytes is not None:
        tiles.append(("peak memory", size(state.peak_memory_bytes), "of the whole process"))
    return Tiles(tuple(tiles))


def _value_of(result: EvaluationResult) -> str:
    return recorded_text(result.metric, result.value)


def _measured(states: Sequence[RunStatus]) -> list[Section]:
    table = data.measured_by_sparsity(states)
    if not any(math.isfinite(row) for row in table.numbers("value")):
        return []
    metrics = [metric_of(str(name)) for name in table.distinct("metric")]
    titles = " and ".join(metric.title for metric in metrics)
    better = ", ".join(
        f"{metric.title}: {'higher is better' if metric.higher_is_better else 'lower is better, log scale'}"
        for metric in metrics
    )
    caption = (
        f"{titles[0].upper()}{titles[1:]} ({better}) against the share of prunable weights that are masked in the "
        "exported model. Dashed: the model before pruning."
    )
    title = f"{titles[0].upper()}{titles[1:]} against sparsity"
    picture = Picture("measured", plots.measured_by_sparsity(table), title, caption, table.csv())
    return [Section("measured", title, (picture, _numbers(table)))]


def _samples(runs: Sequence[RunReport], names: Sequence[str]) -> list[Section]:
    """Text that the language models generate for the same prompts."""
    by_model: dict[str, list[tuple[str, tuple[Continuation, ...]]]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.continuations:
            by_model.setdefault(run.state.config.model, []).append((name, run.continuations))
    if not by_model:
        return []
    note = "Each model writes on from the prompt (in colour), always with its most probable token."
    parts: list[Part] = [Paragraph(note)]
    for model, found in by_model.items():
        columns = (f"{Path(model).name}, dense", *(name if len(runs) > 1 else "pruned" for name, _ in found))
        rows = tuple(
            (text.prompt, (text.dense, *(written[number].pruned for _, written in found)))
            for number, text in enumerate(found[0][1])
        )
        parts.append(Texts(columns, rows))
    return [Section("text", "What the models write", tuple(parts))]


def _masks(runs: Sequence[RunReport], names: Sequence[str]) -> list[Section]:
    """Segmentation masks that the vision models predict for the same points."""
    by_model: dict[tuple[str, str], list[tuple[str, tuple[MaskSample, ...]]]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.masks:
            by_model.setdefault((run.state.config.model, run.masks[0].source), []).append((name, run.masks))
    if not by_model:
        return []
    parts: list[Part] = [Paragraph("Each model is asked for the object at the red point; the best of its three masks.")]
    for number, found in enumerate(by_model.values()):
        titles = [name if len(runs) > 1 else "pruned" for name, _ in found]
        drawn = mask_gallery([samples for _, samples in found], titles)
        parts.append(
            Picture(f"masks-{number}" if number else "masks", drawn, "Masks of the dense and the pruned model")
        )
    return [Section("masks", "What the models see", tuple(parts))]


def _settings(runs: Sequence[RunReport], names: Sequence[str]) -> Section:
    """One row per setting; rows in which the runs differ are highlighted."""
    columns = [_settings_of(run) for run in runs]
    fields = list(dict.fromkeys(field for column in columns for field in column))
    rows = tuple((field, *(column.get(field, "-") for column in columns)) for field in fields)
    marked = frozenset(number for number, row in enumerate(rows) if len(set(row[1:])) > 1)
    titles = ("setting", *names) if len(runs) > 1 else ("setting", "value")
    parts: list[Part] = [Table(titles, rows, num_labels=1 + len(runs), marked=marked)]
    if len(runs) > 1:
        parts.insert(0, Paragraph("Set off: what differs between the runs."))
    changes = [
        scrub(f"{name}: {line}")
        for run, name in zip(runs, names, strict=True)
        for line in run.state.environment_changes
    ]
    return Section("settings", "Settings", (*parts, *(Paragraph(change) for change in changes)))


def _settings_of(run: RunReport) -> dict[str, str]:
    values = scrub_values(run.state.config.as_json())
    shown = {field: _setting(value) for field, value in values.items() if value not in (None, [], {})}
    return {**shown, "model files": scrub(run.model), **run.environment, "begun": run.created}


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_Figure = tuple[str, str, Dataset, Callable[[Dataset], bytes], str]  # anchor, title, numbers, drawing, caption


def _figures_of(state: RunStatus, prefix: str) -> list[tuple[str, str, tuple[Part, ...]]]:
    """(anchor, title, parts) of each figure for which the run's commits have data."""
    loss = state.config.loss
    relative = loss is not None and LOSSES[loss].is_relative
    kept = "" if state.config.held_out else " No samples were held out: all were trained on."
    plan: list[_Figure] = [
        (
            "error",
            "Error by block",
            data.error_by_block(state),
            lambda table: plots.error_by_block(table, relative),
            "How far the biased stream (through what is pruned) is from the dense one (through the original) where it "
            "leaves each block: before and after a block, still dense, has learnt to make up for those before it; and "
            f"before and after it is trained once pruned. Log scale.{kept}",
        ),
        (
            "layers",
            "Error by layer",
            data.pruning_error_by_layer(state),
            plots.pruning_error_by_layer,
            "What pruning alone does to the output of each layer, relative to that output, over the calibration set "
            "as it comes through the blocks pruned before. Log scale.",
        ),
        (
            "sparsity",
            "Budget and sparsity",
            data.sparsity_by_layer(state),
            plots.sparsity_by_layer,
            _how_exact(state),
        ),
        (
            "training",
            "Training",
            data.training_curves(state),
            plots.training_curves,
            "Loss over the epochs of each block's training. A ring: the epoch whose weights were kept (0: no epoch "
            "helped, and the block stayed as it was). After an epoch that did not help, training goes on from the best "
            "weights at a lower rate.",
        ),
        (
            "steps",
            "Time and memory",
            data.steps(state),
            plots.steps,
            "Each step of the run, in the order in which they were done. Memory is that of the whole process.",
        ),
        *_curves(state),
    ]
    found: list[tuple[str, str, tuple[Part, ...]]] = [
        (anchor, title, (Picture(f"{prefix}{anchor}", draw(table), title, caption, table.csv()), _numbers(table)))
        for anchor, title, table, draw, caption in plan
        if table.rows
    ]
    results = _step_results(state)
    return [*found, ("step-results", "Results of steps", results)] if results else found


def _curves(state: RunStatus) -> list[_Figure]:
    """The curves that steps report beside those of blocks."""
    return [
        (f"series-{number}", title, table, plots.series, "As the steps report it.")
        for number, (title, table) in enumerate(data.series(state).items())
    ]


def _step_results(state: RunStatus) -> tuple[Part, ...]:
    """What steps report that stands in no other table; nothing where there is none."""
    rows = tuple(
        (scrub(step.name), scrub(step.headline)) for step in state.steps if step.headline and not step.is_tabled
    )
    return (Table(("step", "result"), rows, num_labels=2),) if rows else ()


def _how_exact(state: RunStatus) -> str:
    pairs = [(layer.num_masked, layer.num_found) for block in state.blocks for layer in block.layers]
    found = [(asked, counted) for asked, counted in pairs if counted is not None]
    if not found:
        return "Share of the weights of each layer that the budget masks. No block is finished yet."
    off = sum(abs(asked - counted) for asked, counted in found)
    more = "" if len(found) == len(pairs) else f" {len(pairs) - len(found)} layers are not finished yet."
    return (
        f"Share of the weights of each layer that the budget masks, and that are masked in the weights as exported: "
        f"{sum(counted for _, counted in found):,} weights, {off:,} of them off the budget.{more}"
    )


def _numbers(table: Dataset) -> Table:
    rows = tuple(tuple(_number(cell) for cell in row) for row in table.rows)
    return Table(table.columns, rows, num_labels=2, is_folded=True, title="The numbers")


def _number(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.6g}" if isinstance(cell, float) else scrub(str(cell))


def _distinct_names(runs: Sequence[RunReport]) -> list[str]:
    """A distinct short name per run, valid as a file name and an anchor."""
    names: list[str] = []
    for run in runs:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", scrub(run.name)).strip("-.") or "run"
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names
