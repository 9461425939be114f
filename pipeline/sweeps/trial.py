"""A trial, one run of a sweep, and its state."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.rundir.records import JsonObject
from pipeline.runs.status import RunStatus


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    point: JsonObject  # settings that differ between trials
    number: int | None = None  # only in a search


@dataclass(frozen=True)
class TrialState:
    """State of a trial."""

    trial: Trial
    state: str  # "waiting", "begun", "done", "failed"
    run: RunStatus | None
    error: str | None = None

    @property
    def value(self) -> float | None:
        """Metric of the pruned model on the first data source."""
        found = [e for e in self.run.evaluations if e.which == "pruned"] if self.run is not None else []
        return found[0].value if found else None
