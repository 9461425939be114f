"""The exported model as users see it: its folder in the run directory, and its card."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from pipeline.errors import DamagedData
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.status import AccuracyResult, RunStatus, described, side_by_side, status
from pipeline.steps.committed import is_exported
from pipeline.steps.run_facts import facts_of
from stages.version import VERSION

if TYPE_CHECKING:
    from stages.model_card import CardFacts


class ModelView:
    """The folder ``model/`` of a run, kept up to date with its commits."""

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._run, self._config = run, config
        self._num_commits: int | None = None  # that the card shows

    def refresh(self) -> None:
        """Publish the exported model and write its card, if a commit has been added since."""
        from stages.model_card import model_card
        from stages.models.loader import loader_of
        from stages.models.source_card import source_card

        run = self._run
        if not is_exported(run) or self._num_commits == len(run.commits):
            return
        folder = run.publish("model")
        facts = card_facts(run, self._config)
        facts = replace(facts, loader=loader_of(folder, facts.loader), source_card=source_card(folder))
        run.write_view("model/README.md", model_card(facts))
        self._num_commits = len(run.commits)


def card_facts(run: RunDirectory, config: RunConfig) -> CardFacts:
    """What the exported model's card says."""
    from stages.model_card import CardFacts, CardFigure
    from stages.tasks.registry import task_named

    state = status(run, config)
    figures = []
    for pair in side_by_side(state.evaluations):
        dense, pruned = pair.get("dense"), pair.get("pruned")
        either = next(iter(pair.values()))
        values = [found.value if found else None for found in (dense, pruned)]
        figures.append(CardFigure(either.source, either.metric, values[0], values[1], described(either)))
    rows: dict[tuple[str, str], dict[str, AccuracyResult]] = {}
    for result in state.accuracies:
        note = f"first {result.num_rows:,} of {result.num_rows_available:,} rows" if result.is_partial else ""
        rows.setdefault((result.task, note), {})[result.which] = result
    accuracies = tuple(
        CardFigure(
            f"{task} ({metric})", metric, _metric(pair.get("dense"), metric), _metric(pair.get("pruned"), metric), note
        )
        for (task, note), pair in rows.items()
        for metric in ("acc", "acc_norm")
        if any(metric in found.metrics for found in pair.values())
    )
    settings = {k: v for k, v in config.identity.items() if k not in ("model", "revision")}
    model = facts_of(run).model
    if state.num_masked is None or state.num_other_zeros is None:
        raise DamagedData(f"{run.label} is damaged: its exported model is not the result of a step that exports")
    return CardFacts(
        task=model.task,
        loader=task_named(model.task).loader,
        base_model=model.name,
        is_on_hub=model.source == "hub",
        revision=model.revision,
        method=config.method,
        goal=state.goal,
        num_masked=state.num_masked,
        num_prunable=state.num_prunable,
        num_other_zeros=state.num_other_zeros,
        is_quantized=config.bits is not None,
        settings=settings,
        figures=tuple(figures),
        accuracies=accuracies,
        version=VERSION,
        source_card=None,
        end_loss=_end_loss(state),
    )


def _end_loss(state: RunStatus) -> str | None:
    found = state.end_loss
    return (
        None if found is None else f"{found.title}: {found.text} {found.measured_on} (calibration set: {found.source})"
    )


def _metric(result: AccuracyResult | None, name: str) -> float | None:
    return None if result is None else result.metrics.get(name)
