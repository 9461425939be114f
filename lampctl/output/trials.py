"""Trials of a sweep as a table on a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lampctl.output.labels import source_label
from lampctl.output.units import duration
from pipeline.runs.status import described
from stages.metrics.registry import figure_text, metric_of

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.rundir.records import JsonObject
    from pipeline.sweeps.sweep import Sweep
    from pipeline.sweeps.trial import TrialState


def trial_record(state: TrialState) -> JsonObject:
    """One trial as a record for JSON and CSV."""
    run = state.run
    return {
        "trial": state.trial.name,
        "state": state.state,
        "settings": state.trial.point,
        "value": state.value,
        "evaluations": [result.record() for result in run.evaluations] if run is not None else [],
        "sparsity": run.sparsity if run is not None else None,
        "pruning_s": run.pruning_s if run is not None else None,
        "peak_memory_bytes": run.peak_memory_bytes if run is not None else None,
        "run": run.label if run is not None else None,
        "error": state.error,
    }


def show_trials(sweep: Sweep, states: Sequence[TrialState], as_json: bool) -> None:
    """Print all trials with their settings, state and metrics."""
    if as_json:
        record = {"sweep": sweep.storage.label, "varies": list(sweep.spec.fields)}
        print(json.dumps({**record, "trials": [trial_record(state) for state in states]}, indent=2))
        return
    table = Table(title=f"{sweep.storage.label}", title_justify="left")
    for field in sweep.spec.fields:
        table.add_column(field, justify="right")
    table.add_column("state")
    measured = list(
        dict.fromkeys(
            (result.metric, result.source) for state in states if state.run for result in state.run.evaluations
        )
    )
    for metric, source in measured:
        table.add_column(f"{metric_of(metric).title}\n{source_label(source)}", justify="right")
    for title in ("achieved", "pruning time"):
        table.add_column(title, justify="right")
    for state in states:
        table.add_row(*_row(sweep, state, measured))
    console = Console(markup=False)
    console = console if console.is_terminal else Console(width=160, markup=False)
    console.print(table)
    note = partial_note(states)
    if note is not None:
        console.print(note)
    dense = [r for state in states if state.run for r in state.run.evaluations if r.which == "dense"]
    for result in dense:
        console.print(f"dense: {metric_of(result.metric).title} {figure_text(result.metric, result.value)}")
    for state in states:
        if state.error is not None:
            console.print(f"{state.trial.name} failed: {state.error}", soft_wrap=True)
    done = sum(state.state == "done" for state in states)
    console.print(f"{done} of {sweep.spec.num_trials or len(states)} trials are done")
    best = _best(states)
    if best is not None and sweep.spec.search:
        console.print(f"best: trial {best.trial.name}, {best.value:.4g}, at {_point(best)}")


def trial_value(state: TrialState, what: tuple[str, str]) -> float | None:
    """A trial's metric of the pruned model. what: metric and data source."""
    results = state.run.evaluations if state.run is not None else ()
    found = [r.value for r in results if (r.metric, r.source) == what and r.which == "pruned"]
    return found[-1] if found else None


def is_partial(state: TrialState, what: tuple[str, str]) -> bool:
    """Whether a trial's metric is of a part of the data only."""
    results = state.run.evaluations if state.run is not None else ()
    return any(r.is_partial for r in results if (r.metric, r.source) == what and r.which == "pruned")


def partial_note(states: Sequence[TrialState]) -> str | None:
    """The footnote of a star, if there is one."""
    found = [r for state in states if state.run for r in state.run.evaluations if r.is_partial]
    return f"* {described(found[0])}" if found else None


def _row(sweep: Sweep, state: TrialState, measured: Sequence[tuple[str, str]]) -> list[str]:
    cells = [_value(state.trial.point.get(field)) for field in sweep.spec.fields]
    cells.append(state.state)
    run = state.run
    for what in measured:
        star = "*" if is_partial(state, what) else ""
        cells.append(figure_text(what[0], trial_value(state, what)) + star)
    cells.append("-" if run is None or run.sparsity is None else f"{100 * run.sparsity:.2f}%")
    cells.append("-" if run is None or not run.num_done else duration(run.pruning_s))
    return cells


def _best(states: Sequence[TrialState]) -> TrialState | None:
    done = [state for state in states if state.state == "done" and state.value is not None and state.run is not None]
    if not done:
        return None
    assert done[0].run is not None
    metric = metric_of(done[0].run.evaluations[0].metric)
    sign = -1 if metric.higher_is_better else 1
    return min(done, key=lambda state: sign * (state.value or 0.0))


def _point(state: TrialState) -> str:
    return ", ".join(f"{field} {_value(value)}" for field, value in state.trial.point.items())


def _value(value: JsonValue) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
