"""Tables and JSON on stdout: what a run is, how far it is, what came of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lampctl.output.accuracy import accuracy_table, mean_notes, means_record
from lampctl.output.comparison import Comparison
from lampctl.output.console import console_here, shown_path
from lampctl.output.end_loss import end_loss_lines, worse_than_baselines
from lampctl.output.labels import layer_label, source_label, step_label
from lampctl.output.units import duration, size, time_left
from pipeline.rundir.storage.locate import is_address
from pipeline.runs.status import (
    AccuracyResult,
    BlockState,
    EvaluationResult,
    RunStatus,
    StepState,
    described,
    side_by_side,
)
from pipeline.runs.status import status as status_of
from pipeline.steps.registry import STEP_KINDS
from stages.metrics.registry import metric_of, recorded_text
from stages.models.loader import loader_of
from stages.pruners.registry import method_title
from stages.tasks.registry import task_named

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.plan import Step
    from pipeline.rundir.records import JsonObject
    from pipeline.rundir.run_directory import RunDirectory


def results(runs: Sequence[RunDirectory], configs: Sequence[RunConfig], as_json: bool) -> None:
    """The figures of a run and of its baselines side by side; where the model lies and how to open it.

    A run that is worse than a baseline is warned of on stderr.
    """
    states = [status_of(run, config) for run, config in zip(runs, configs, strict=True)]
    warnings = worse_than_baselines(states)
    for sentence in warnings:
        Console(stderr=True, markup=False).print(f"warning: {sentence}", highlight=False, soft_wrap=True)
    if as_json:
        report = result_record(states[0])
        report["baselines"] = [result_record(state) for state in states[1:]]
        report["warnings"] = [*warnings]
        print(json.dumps(report, indent=2))
        return
    console = console_here()
    main = states[0]
    measured = [s for s in states for e in s.evaluations if _is_current(s, e)]
    if measured:
        console.print(_results_table(states))
        partial = [e for e in main.evaluations if _is_current(main, e) and e.is_partial]
        if partial:
            console.print(f"* {described(partial[0])}")
    else:
        for state in states:
            console.print(_summary_line(state))
    for line in end_loss_lines(states):
        console.print(line, highlight=False, soft_wrap=True)
    accuracies = _current_accuracies(states)
    if accuracies:
        console.print(accuracy_table(accuracies))
        for line in mean_notes(next(iter(accuracies.values()))):
            console.print(line, highlight=False)
    for state in states[1:]:
        if state.model is not None:
            console.print(f"\n{method_title(state.config.method)}:", shown_path(state.model), highlight=False, end="")
    if main.model is not None:
        console.print("\nThe pruned model:", shown_path(main.model), soft_wrap=True, highlight=False)
        if not is_address(main.model):
            task = task_named(main.task)
            loader = loader_of(Path(main.model), task.loader)
            load = f'{loader}.from_pretrained("{shown_path(main.model)}", dtype="{task.loader_dtype}")'
            console.print("Load it:          " + load, soft_wrap=True, highlight=False)


def result_record(state: RunStatus) -> JsonObject:
    """What `--json` prints of one run."""
    return {
        "run": state.label,
        "method": state.config.method,
        "is_finished": state.is_finished,
        "sparsity": state.sparsity,
        "num_masked": state.num_masked,
        "num_prunable": state.num_prunable,
        "num_other_zeros": state.num_other_zeros,
        "pruning_s": state.pruning_s,
        "elapsed_s": state.elapsed_s,
        "peak_memory_bytes": state.peak_memory_bytes,
        "peak_device_bytes": state.peak_device_bytes,
        "model": state.model,
        "evaluations": [result.record() for result in state.evaluations if _is_current(state, result)],
        "accuracies": [asdict(result) for result in state.accuracies if _is_current(state, result)],
        "end_loss": state.end_loss.model_dump(mode="json") if state.end_loss is not None else None,
        "mean_accuracies": {
            which: means_record([r for r in state.accuracies if r.which == which and _is_current(state, r)])
            for which in ("dense", "pruned")
        },
        "config": state.config.as_json(),
    }


def status(state: RunStatus, provenance: Mapping[str, str] | None, as_json: bool) -> None:
    """A run at a glance."""
    if as_json:
        record = {
            **result_record(state),
            "next_step": state.next_step,
            "num_done": state.num_done,
            "remaining_s": state.remaining_s,
            "remaining_until": state.remaining_until,
            "holder": state.holder,
            "environment_changes": list(state.environment_changes),
            "steps": [asdict(step) for step in state.steps],
            "blocks": [asdict(block) for block in state.blocks],
            "provenance": dict(provenance) if provenance is not None else None,
        }
        print(json.dumps(record, indent=2))
        return
    console = console_here()
    console.print(f"{shown_path(state.label)}: {_summary_line(state)}", highlight=False, soft_wrap=True)
    if state.is_finished:
        how_far = f"finished, {len(state.steps)} steps in {duration(state.elapsed_s)}"
    else:
        how_far = (
            f"{state.num_done} of {len(state.steps)} steps in {duration(state.elapsed_s)}; next: {state.next_step}"
        )
        if left := time_left(state.remaining_s, state.remaining_until):
            how_far += f"; {left}"
    console.print(how_far, highlight=False, soft_wrap=True)
    if state.holder is not None:
        console.print(f"is being worked on by {state.holder}", highlight=False, soft_wrap=True)
    for change in state.environment_changes:
        console.print(change, highlight=False, soft_wrap=True)
    if provenance is not None:
        console.print(_settings_table(state.config, provenance))
    console.print(_blocks_table(state.blocks))
    if state.num_done:
        console.print(_kinds_table(state.steps))
    others = _headlines_table(state.steps)
    if others.row_count:
        console.print(others)
    if state.evaluations:
        console.print(_evaluations_table(state))
    if state.accuracies:
        titles = {"dense": "dense", "pruned": method_title(state.config.method)}
        for place, results in _by_place(state.accuracies).items():
            found = {title: [r for r in results if r.which == which] for which, title in titles.items()}
            console.print(accuracy_table({title: those for title, those in found.items() if those}))
            if place is not None:
                console.print(f"rows of {shown_path(place)}", highlight=False, soft_wrap=True)
    if state.model is not None:
        console.print(f"The pruned model: {shown_path(state.model)}", highlight=False, soft_wrap=True)


def begun(
    run: RunDirectory,
    config: RunConfig,
    origins: Mapping[str, str],
    notices: Sequence[str],
    steps: Sequence[Step],
) -> None:
    """What `lampctl init` has decided."""
    console = console_here()
    state = status_of(run, config)
    console.print(_settings_table(config, origins))
    console.print(_blocks_table(state.blocks))
    for notice in notices:
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    plan = [step.name for step in steps]
    brief = plan if len(plan) <= 8 else [*plan[:5], "...", *plan[-3:]]
    console.print(f"{len(plan)} steps: {', '.join(brief)}", highlight=False, soft_wrap=True)
    next_step(run, config)


def next_step(run: RunDirectory, config: RunConfig) -> None:
    """The command that goes on with a run."""
    state, where = status_of(run, config), shown_path(run.label)
    if state.next_step is None:
        line = f"{where} is finished"
    else:
        command = STEP_KINDS.get(state.next_step.partition("/")[0]).command
        line = f"Next: lampctl {command} {where}   (or all that is left: lampctl resume {where})"
        if command is None:
            line = f"Next: {state.next_step}, by lampctl resume {where}"
    console_here().print(line, highlight=False, soft_wrap=True)


def model_is_back(run: RunDirectory) -> None:
    """The exported folder was made once more."""
    console_here().print(f"The pruned model: {shown_path(f'{run.label}/model')}", highlight=False, soft_wrap=True)


def comparison(table: Comparison) -> None:
    """Runs and models side by side; under each figure its difference from the first row's."""
    shown = Table("", "method")
    for column in table.columns:
        shown.add_column(column.title, justify="right")
    for row in table.rows:
        cells = [table.cell(row, column).replace(" (", "\n(") for column in table.columns]
        shown.add_row(shown_path(row.label), row.what, *cells)
    console_here().print(shown)


def _summary_line(state: RunStatus) -> str:
    config = state.config
    achieved = (
        "" if state.sparsity is None else f", {100 * state.sparsity:.4f}% of {state.num_prunable:,} weights masked"
    )
    return f"{Path(config.model).name}, {method_title(config.method)} at {state.goal}{achieved}"


def _is_current(state: RunStatus, result: EvaluationResult | AccuracyResult) -> bool:
    """Whether an evaluation is one that the settings in force ask for."""
    return any(step.name == result.step for step in state.steps)


def _current_accuracies(states: Sequence[RunStatus]) -> dict[str, list[AccuracyResult]]:
    """The accuracies that the settings in force ask for, by model: dense first, then the baselines, then the run."""
    main = states[0]
    dense = [r for r in main.accuracies if r.which == "dense" and _is_current(main, r)]
    found = {"dense": dense} if dense else {}
    for state in (*states[1:], main):
        pruned = [r for r in state.accuracies if r.which == "pruned" and _is_current(state, r)]
        if pruned:
            found[method_title(state.config.method)] = pruned
    return found


def _by_place(accuracies: Sequence[AccuracyResult]) -> dict[str | None, list[AccuracyResult]]:
    """The accuracies by where their rows lie: other rows of the same name are another measurement."""
    found: dict[str | None, list[AccuracyResult]] = {}
    for result in accuracies:
        found.setdefault(result.task_data, []).append(result)
    return found


def _results_table(states: Sequence[RunStatus]) -> Table:
    """Dense first, then the baselines, then the run itself."""
    main = states[0]
    found = {
        (number, result.which, (result.metric, result.source)): result
        for number, state in enumerate(states)
        for result in state.evaluations
        if _is_current(state, result)
    }
    measured = list(dict.fromkeys(what for _, _, what in found))
    table = Table(title=f"{Path(main.config.model).name} at {main.goal}", title_justify="left")
    table.add_column("method")
    for metric, source in measured:
        table.add_column(f"{metric_of(metric).title}\n{source_label(source)}", justify="right")
    for title in ("sparsity", "pruning time", "peak memory"):
        table.add_column(title, justify="right")
    if any(which == "dense" for _, which, _ in found):
        table.add_row("dense", *(_marked(found.get((0, "dense", what))) for what in measured), "0%", "-", "-")
    order = [*range(1, len(states)), 0]
    for number in order:
        state = states[number]
        table.add_row(
            method_title(state.config.method),
            *(_marked(found.get((number, "pruned", what))) for what in measured),
            "-" if state.sparsity is None else f"{100 * state.sparsity:.4f}%",
            duration(state.pruning_s),
            _memory(state.peak_memory_bytes, state.peak_device_bytes),
        )
    return table


def _memory(process: int | None, device: int | None) -> str:
    """Peak memory: the GPU's, which is the scarce one, where there was one."""
    if device is not None:
        return f"{size(device)} (GPU)"
    return "-" if process is None else size(process)


def _kinds_table(steps: Sequence[StepState]) -> Table:
    """What each kind of step has taken."""
    done: dict[str, list[StepState]] = {}
    for step in steps:
        if step.is_done:
            done.setdefault(step.kind, []).append(step)
    has_device = any(step.peak_device_bytes is not None for step in steps)
    table = Table("kind of step")
    titles = ("done", "one takes", "in all", "peak memory")
    for title in (*titles, "peak GPU memory") if has_device else titles:
        table.add_column(title, justify="right")
    for kind, those in done.items():
        seconds = [step.elapsed_s or 0.0 for step in those]
        row = [kind, str(len(those)), duration(statistics.median(seconds)), duration(sum(seconds))]
        row.append(size(max(step.peak_memory_bytes or 0 for step in those)))
        if has_device:
            row.append(size(max(step.peak_device_bytes or 0 for step in those)))
        table.add_row(*row)
    return table


def _headlines_table(steps: Sequence[StepState]) -> Table:
    """What steps report that stands in no other table."""
    table = Table("step", "result")
    for step in steps:
        if step.headline and not step.is_tabled:
            table.add_row(step_label(step.name), step.headline)
    return table


def _evaluations_table(state: RunStatus) -> Table:
    """Every figure that the run has measured, on whatever settings."""
    table = Table("measured", "on", "how")
    table.add_column("dense", justify="right")
    table.add_column(method_title(state.config.method), justify="right")
    for pair in side_by_side(state.evaluations):
        either = next(iter(pair.values()))
        values = (_value(pair.get(which)) for which in ("dense", "pruned"))
        table.add_row(metric_of(either.metric).title, source_label(either.source), described(either), *values)
    return table


def _marked(result: EvaluationResult | None) -> str:
    """With a star where only a part was measured."""
    return _value(result) + ("*" if result is not None and result.is_partial else "")


def _value(result: EvaluationResult | None) -> str:
    if result is None:
        return "-"
    return recorded_text(result.metric, result.value)


def _settings_table(config: RunConfig, origins: Mapping[str, str]) -> Table:
    table = Table("setting", "value", "from")
    for name, value in config.as_json().items():
        if value not in (None, [], {}):
            table.add_row(name, str(value), origins.get(name, "default"))
    return table


def _blocks_table(blocks: Sequence[BlockState]) -> Table:
    """Per block: its state, its budget as a whole and by layer, the loss before and after each training."""
    paths = list(dict.fromkeys(layer_label(layer.name, block.block) for block in blocks for layer in block.layers))
    table = Table("block", "state")
    table.add_column("budget", justify="right")
    for path in paths:
        table.add_column(path, justify="right", no_wrap=True)
    names = list(dict.fromkeys(training.name for block in blocks for training in block.trainings))
    for name in names:
        table.add_column(f"{name} before", justify="right")
        table.add_column("after", justify="right")
    for block in blocks:
        shares = {layer_label(x.name, block.block): f"{100 * x.num_masked / x.size:.1f}%" for x in block.layers}
        whole = f"{100 * block.num_masked / block.size:.2f}%" if block.size else "-"
        row = [str(block.block), block.state, whole, *(shares.get(path, "-") for path in paths)]
        trained = {training.name: training for training in block.trainings}
        for name in names:
            losses = trained[name].judged if name in trained else (None, None)
            row += ["-" if loss is None else f"{loss:.4g}" for loss in losses]
        table.add_row(*row)
    return table
