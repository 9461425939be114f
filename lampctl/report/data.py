"""Numbers of each figure of the report, as tables that are also written as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lampctl.output.labels import layer_label, measured_label
from pipeline.rundir.redact import scrub
from pipeline.runs.status import BlockState, RunStatus, side_by_side
from stages.pruners.registry import method_title

Cell = str | int | float | None

WHOLE_BLOCK = "whole block"


@dataclass(frozen=True)
class Dataset:
    """A table with named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def column(self, name: str) -> list[Cell]:
        """All values of a column."""
        number = self.columns.index(name)
        return [row[number] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """All values of a column, NaN for missing ones."""
        return [float(value) if isinstance(value, int | float) else math.nan for value in self.column(name)]

    def where(self, name: str, value: Cell) -> Dataset:
        """The rows with this value in a column."""
        number = self.columns.index(name)
        return Dataset(self.columns, tuple(row for row in self.rows if row[number] == value))

    def distinct(self, name: str) -> list[Cell]:
        """Distinct values of a column in order."""
        return list(dict.fromkeys(self.column(name)))

    def csv(self) -> str:
        """The table as CSV; unknown values are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return out.getvalue()


def measured_by_sparsity(states: Sequence[RunStatus]) -> Dataset:
    """Every metric of every exported run, and of the originals at sparsity 0."""
    rows: list[tuple[Cell, ...]] = []
    originals: set[tuple[Cell, ...]] = set()
    for state in states:
        for pair in side_by_side(state.evaluations):
            metric, source, protocol, amount, _ = next(iter(pair.values())).measured_on
            about = (scrub(state.config.model), metric, measured_label(source, protocol), amount)
            if "dense" in pair and about not in originals:
                originals.add(about)
                rows.append((*about, "dense", None, 0.0, pair["dense"].value))
            if "pruned" in pair and state.sparsity is not None:
                rows.append((*about, series_of(state), scrub(state.label), state.sparsity, pair["pruned"].value))
    return Dataset(("model", "metric", "data", "amount", "series", "run", "sparsity", "value"), tuple(rows))


def series_of(state: RunStatus) -> str:
    """What runs have in common that are one line of a figure: method, pattern and bits."""
    config = state.config
    parts = (method_title(config.method), config.pattern, f"int{config.bits}" if config.bits else None)
    return " ".join(part for part in parts if part)


def error_by_block(state: RunStatus) -> Dataset:
    """The losses around the training of each block: how far the biased stream is from the dense one behind it.

    One row for each training of a block.
    """
    rows: list[tuple[Cell, ...]] = []
    for block in state.blocks:
        for training in block.trainings:
            before, after = training.before, training.after
            if training.judged == (None, None):
                continue
            losses = (before.trained, after.trained, before.held_out, after.held_out)
            rows.append((block.block, training.name, *losses))
    return Dataset(("block", "training", "before", "after", "before_held_out", "after_held_out"), tuple(rows))


def pruning_error_by_layer(state: RunStatus) -> Dataset:
    """|W x - W' x|^2 / |W x|^2 of each layer, x being its input in the biased stream."""
    rows = tuple(
        (block.block, layer_label(layer.name, block.block), layer.relative_error)
        for block in state.blocks
        for layer in block.layers
        if layer.relative_error is not None
    )
    return Dataset(("block", "layer", "relative_error"), rows)


def sparsity_by_layer(state: RunStatus) -> Dataset:
    """What the budget asks of each layer and of each block as a whole, and what is found in the weights as exported."""
    rows: list[tuple[Cell, ...]] = []
    for block in state.blocks:
        for layer in block.layers:
            label = layer_label(layer.name, block.block)
            rows.append(_sparsity_row(block, label, layer.size, layer.num_masked, layer.num_found))
        found = [layer.num_found for layer in block.layers]
        known = [number for number in found if number is not None]
        total = sum(known) if len(known) == len(found) else None
        rows.append(_sparsity_row(block, WHOLE_BLOCK, block.size, block.num_masked, total))
    columns = ("block", "layer", "num_weights", "num_budgeted", "num_found", "budget", "achieved")
    return Dataset(columns, tuple(rows))


def _sparsity_row(block: BlockState, layer: str, size: int, budgeted: int, found: int | None) -> tuple[Cell, ...]:
    achieved = None if found is None or not size else found / size
    return (block.block, layer, size, budgeted, found, budgeted / size if size else 0.0, achieved)


def training_curves(state: RunStatus) -> Dataset:
    """The loss of each block over the epochs of its training; epoch 0 is before it.

    `trained` of an epoch is the mean over its own steps, each from before its update.
    """
    rows: list[tuple[Cell, ...]] = []
    for block in state.blocks:
        for training in block.trainings:
            if not training.epochs:
                continue
            rows += [
                (block.block, training.name, epoch, loss.trained, loss.held_out, int(epoch == training.kept_epoch))
                for epoch, loss in enumerate((training.before, *training.epochs))
            ]
    return Dataset(("block", "training", "epoch", "trained", "held_out", "is_kept"), tuple(rows))


def series(state: RunStatus) -> dict[str, Dataset]:
    """The curves that steps report, by the title of their figure."""
    rows: dict[str, list[tuple[Cell, ...]]] = {}
    for step in state.steps:
        for curve in step.series:
            found = rows.setdefault(curve.title, [])
            found += [(step.name, curve.x_title, curve.y_title, x, y) for x, y in curve.points]
    columns = ("step", "x_title", "y_title", "x", "y")
    return {title: Dataset(columns, tuple(found)) for title, found in rows.items()}


def steps(state: RunStatus) -> Dataset:
    """Time and peak memory of each step that is done, in their order."""
    rows = tuple(
        (number, step.name, step.kind, step.block, step.elapsed_s, step.peak_memory_bytes, step.peak_device_bytes)
        for number, step in enumerate(step for step in state.steps if step.is_done)
    )
    columns = ("number", "step", "kind", "block", "elapsed_s", "peak_memory_bytes", "peak_device_bytes")
    return Dataset(columns, rows)
