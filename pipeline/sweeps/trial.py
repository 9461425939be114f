"""One run of a sweep, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.runs.status import RunStatus


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    point: dict[str, Any]  # the settings that are its own
    number: int | None = None  # of a search


@dataclass(frozen=True)
class TrialState:
    """How far a trial is."""

    trial: Trial
    state: str  # "waiting", "begun", "done", "failed"
    run: RunStatus | None
    error: str | None = None

    @property
    def value(self) -> float | None:
        """The figure that counts, of the pruned model on the first source."""
        found = [e for e in self.run.evaluations if e.which == "pruned"] if self.run is not None else []
        return found[0].value if found else None
