"""Reproduce a table of the paper: one run per cell, as the trials of one sweep per model.

Tables that differ only in what they measure (1 and 2, 4 and 5) share their runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.completion import complete
from pipeline.config.gather import Gathered
from pipeline.config.run_config import RUNTIME_FIELDS, RunConfig
from pipeline.errors import ConfigError
from pipeline.paper.estimates import KNOWN, Estimate, Scale, estimate
from pipeline.paper.tables import Table, published, settings_of
from pipeline.rundir.storage.locate import locate, require_named
from pipeline.runs.status import RunStatus
from pipeline.sweeps.spec import SweepSpec, name_of, settings_at
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import TrialState
from stages.formats.file_digest import local_path
from stages.tasks.registry import task_named
from stages.training.presets import published as published_settings

# Tables whose runs are the same.
_SHARED = {"table1": "opt", "table2": "opt", "table4": "sam", "table5": "sam"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: our number and the paper's."""

    model: str
    dataset: str
    method: str
    strategy: str
    ours: float | None
    published: float | None
    state: str  # of its run: "done", "waiting", "begun", "failed", "impossible"


def sweep_for(table: Table, model: str, gathered: Gathered, strategies: Sequence[str], root: str) -> Sweep:
    """The runs of a table for one model. gathered: settings that all runs share, except the model.

    Raises UnsupportedPlace where `root` names no place.
    """
    require_named(root)
    points = [
        found
        for strategy in strategies
        for method in table.methods
        if (found := settings_of(table, strategy, method)) is not None
    ]
    path = local_path(model)
    named = str(path.resolve()) if path.exists() else model
    values = {**gathered.values.as_json(), "model": named}
    spec = SweepSpec(
        settings=values, origins=gathered.origins, preset=gathered.preset, points=tuple(points), num_trials=None
    )
    folder = Path(model).name.removesuffix(".gguf") or "model"
    # The digest keeps runs with other settings or another model of this name apart.
    own = {field: value for field, value in values.items() if field not in RUNTIME_FIELDS}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    place = f"{root.rstrip('/')}/{_SHARED.get(table.name, table.name)}/{folder}-{digest}"
    return Sweep(place, locate(place), spec)


def require_task(table: Table, task: str, model: str) -> None:
    """Raise ConfigError if the table is about models of another task."""
    wanted = KNOWN[table.models[0]].task
    if task != wanted:
        raise ConfigError(f"{table.name} is about {wanted} models, and {model} is a {task} model")


def require_fitting(table: Table, gathered: Gathered, task: str, model: str) -> None:
    """Raise ConfigError if the model or the data fits no cell of the table."""
    require_task(table, task, model)
    if table.metric not in ("perplexity", "iou"):
        return
    sources = gathered.values.evaluate or ()
    if not any(_is_of(source, dataset) for source in sources for dataset in table.datasets):
        named = ", ".join(f"{dataset}:PATH" for dataset in table.datasets)
        raise ConfigError(f"{table.name} is measured on {', '.join(table.datasets)}: say --evaluate {named}")
    if table.metric == "iou" and not gathered.given("calibration"):  # a preset's is text
        raise ConfigError(f"{table.name} needs images to calibrate on: --calibration sa1b:DIR, coco:DIR or images:DIR")


def planned(
    table: Table,
    model: str,
    gathered: Gathered,
    strategies: Sequence[str],
    root: str,
    scale: Scale,
    flops_per_s: float,
) -> tuple[list[TrialState], Estimate]:
    """State of a model's runs, and the estimated cost of the unfinished ones.

    Raises ConfigError if the table is about other models.
    """
    require_task(table, scale.task, model)
    sweep = sweep_for(table, model, gathered, strategies, root)
    states = sweep.states()
    todo = [settings_at(sweep.spec.gathered, state.trial.point) for state in states if state.state != "done"]
    return states, estimate(scale, [_usual(found, model, scale) for found in todo], flops_per_s)


def _usual(gathered: Gathered, model: str, scale: Scale) -> RunConfig:
    """The settings of a run that decide its cost, without the model's files."""
    task = task_named(scale.task)
    defaults = published_settings(model.partition("-")[0], gathered.values.sparsity or 0.5)
    values = gathered.values.changed(
        calibration=gathered.values.calibration or "c4",
        seqlen=scale.tokens or gathered.values.seqlen,
        compile=None,
    )
    config, _, _ = complete(Gathered(values, gathered.origins, gathered.preset), None, defaults, task)
    return config


def cells_of(table: Table, model: str, strategies: Sequence[str], states: Sequence[TrialState]) -> list[Cell]:
    """All cells of one model."""
    by_name = {state.trial.name: state for state in states}
    cells = []
    for dataset in table.datasets:
        for method in table.methods:
            for strategy in strategies:
                settings = settings_of(table, strategy, method)
                state = by_name.get(name_of(settings)) if settings is not None else None
                ours = _measured(table, dataset, state.run) if state is not None and state.run is not None else None
                theirs = published().get((table.name, model, dataset, method, strategy))
                cell_state = "impossible" if settings is None else state.state if state is not None else "waiting"
                cells.append(Cell(model, dataset, method, strategy, ours, theirs, cell_state))
    return cells


def _measured(table: Table, dataset: str, run: RunStatus) -> float | None:
    """A run's metric for a column, in the paper's unit."""
    if table.metric == "gpu_memory_gb":
        return run.peak_device_bytes / 1e9 if run.peak_device_bytes is not None else None
    if table.metric == "accuracy":
        return _accuracy(table, dataset, run)
    for result in run.evaluations:
        if result.which == "pruned" and result.metric == table.metric and _is_of(result.source, dataset):
            return result.value if table.metric == "perplexity" or result.value is None else 100 * result.value
    return None


def _is_of(source: str, dataset: str) -> bool:
    """Whether a data source is a copy of a published data set, by its name or the kind before the colon."""
    return source.partition(":")[0] == dataset


def _accuracy(table: Table, task: str, run: RunStatus) -> float | None:
    """Accuracy in percent of one task, or the mean of all; None while some are missing."""
    found = {result.task: result.metrics.get("acc") for result in run.accuracies if result.which == "pruned"}
    wanted = [name for name in table.datasets if name != "mean"] if task == "mean" else [task]
    values = [found.get(name) for name in wanted]
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if len(known) == len(wanted) else None
