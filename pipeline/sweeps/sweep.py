"""Sweeps: many runs that differ in some settings. Every trial is an ordinary run directory.

    SWEEP/sweep.json              what is varied, written once
    SWEEP/shared/<digest>/        a run that stops after calibrate and capture: trials share these two steps
    SWEEP/trials/<name>/          one run each
    SWEEP/failures/<name>.json    why a trial failed; deleted once it succeeds
    SWEEP/search.db               the trials of a search (Optuna), unless --storage names another database

The state of a sweep is the state of its runs. To resume a sweep is to run its trials again in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from pipeline.config.gather import Gathered
from pipeline.config.run_config import RunConfig
from pipeline.engine.job import Listener
from pipeline.engine.stop import StopRequest
from pipeline.errors import (
    ConfigError,
    ConfigMismatch,
    DamagedData,
    FileExists,
    FileGone,
    Interrupted,
    NotARun,
    Occupied,
    PipelineError,
    Preempted,
    RunNotFound,
)
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.locate import is_address, locate
from pipeline.runs.lifecycle import ResumeOptions, reopen, resume, start
from pipeline.runs.prepare import Prepared, prepare
from pipeline.runs.status import status
from pipeline.sweeps.spec import SweepSpec, name_of, points_of, settings_at
from pipeline.sweeps.trial import Trial, TrialState
from stages.errors import StageError

if TYPE_CHECKING:
    from pipeline.sweeps.search import Search

_MEASURES = (
    *("evaluate", "eval_seqlen", "eval_max_tokens", "eval_points", "eval_max_images"),
    *("tasks", "task_data", "task_limit"),
)


class Begin(Protocol):
    """Called with every run before it starts."""

    def __call__(self, run: RunDirectory, config: RunConfig, what: str | None = None, /) -> None:
        """what: what the run is, if it is no trial."""
        ...


_SPEC = "sweep.json"
# Settings that decide the calibration set and the first streams. Trials with equal values share a run.
_SHARED_FIELDS = (
    *("model", "revision", "trust_remote_code", "calibration", "calibration_sampling", "calibration_skip"),
    *("num_samples", "seqlen", "seed", "device", "dtype", "threads", "micro_batch", "scratch_dir"),
    *("allow_environment_change",),
)


class Sweep:
    """A sweep and its folder or address."""

    def __init__(self, place: str, storage: Storage, spec: SweepSpec) -> None:
        self.place, self.storage, self.spec = place, storage, spec

    @classmethod
    def create(cls, place: str, spec: SweepSpec) -> Sweep:
        """Create the sweep at `place`, or open it if it exists with the same specification.

        Raises:
            ConfigMismatch: another sweep is there.
            NotARun: the folder holds other files.
        """
        storage = locate(place)
        if not storage.exists(_SPEC):
            storage.prepare()
            if not storage.is_free() and not storage.exists(_SPEC):
                raise NotARun(f"{storage.label} is not empty and holds no sweep: name a new folder by --sweep-dir")
            with suppress(FileExists):
                storage.create(_SPEC, (spec.model_dump_json(indent=2) + "\n").encode())
        found = cls.open(place)
        different = [f for f in SweepSpec.model_fields if f != "origins" and getattr(found.spec, f) != getattr(spec, f)]
        if different:
            raise ConfigMismatch(
                f"{storage.label} holds another sweep (it differs in {', '.join(different)}): use another --sweep-dir, "
                "or resume that one: lampctl sweep resume"
            )
        return found

    @classmethod
    def open(cls, place: str) -> Sweep:
        """Open the sweep at `place`. Raises RunNotFound or DamagedData."""
        storage = locate(place)
        try:
            spec = SweepSpec.model_validate_json(storage.read(_SPEC))
            _ = spec.gathered  # invalid settings are damage, too
        except FileGone:
            raise RunNotFound(f"there is no sweep at {storage.label}: {_SPEC} is missing") from None
        except ValidationError as error:
            raise DamagedData(f"{storage.label}/{_SPEC} is damaged: {error.errors()[0]['msg']}") from error
        return cls(place, storage, spec)

    def place_of(self, *parts: str) -> str:
        """Path or address of a part of this sweep."""
        if is_address(self.place):
            return "/".join((self.place.rstrip("/"), *parts))
        return str(Path(self.place).absolute().joinpath(*parts))

    # -- trials

    def trials(self) -> list[Trial]:
        """Trials of the grid, or those that a search has sampled so far."""
        if self.spec.search:
            return self._search().drawn()
        seen, found = set(), []
        for point in points_of(self.spec):
            # Trials that differ only in settings that the method does not use are one trial.
            values = json.dumps(settings_at(self.spec.gathered, point).values.as_json())
            if values not in seen:
                seen.add(values)
                found.append(Trial(name_of(point), point))
        return found

    def states(self) -> list[TrialState]:
        """All trials with their state."""
        return [self._state(trial) for trial in self.trials()]

    def _state(self, trial: Trial) -> TrialState:
        error = self._failure(trial)
        try:
            run, config = reopen(self.place_of("trials", trial.name))
        except RunNotFound:
            return TrialState(trial, "failed" if error else "waiting", None, error)
        except (DamagedData, NotARun, ConfigMismatch) as damage:
            return TrialState(trial, "failed", None, str(damage))
        state = status(run, config)
        if state.is_finished and _measures(config, self.spec.gathered):
            return TrialState(trial, "done", state)
        return TrialState(trial, "failed" if error else "begun", state, error)

    def _failure(self, trial: Trial) -> str | None:
        try:
            found: str = json.loads(self.storage.read(f"failures/{trial.name}.json"))["error"]
        except FileGone:
            return None
        except (ValueError, KeyError, TypeError, IndexError, PipelineError) as error:
            return f"the record of its failure cannot be read ({type(error).__name__})"
        return found

    # -- work

    def run(self, begin: Begin, listener: Listener, stop: StopRequest) -> Iterator[TrialState]:
        """Run the unfinished trials in order. A failed trial is reported and the sweep continues.

        Args:
            begin: called with every run before it starts.
            listener: receives progress and warnings.
            stop: request to stop.

        Yields:
            The state of each trial after it ran.

        Raises:
            Preempted, Interrupted: the run was stopped from outside.
        """
        if self.spec.search:
            yield from self._run_search(begin, listener, stop)
            return
        for number, trial in enumerate(self.trials()):
            try:
                yield self._do(trial, begin, listener, stop, evaluates_dense=number == 0)
            except Occupied as error:
                listener.warn(f"trial {trial.name} is skipped, as another process runs it: {error}")

    def _run_search(self, begin: Begin, listener: Listener, stop: StopRequest) -> Iterator[TrialState]:
        search = self._search()
        # First the trials sampled earlier that are not done: unfinished, failed, or without their run.
        waiting = [trial for trial in search.drawn() if self._state(trial).state != "done"]
        while trial := waiting.pop(0) if waiting else search.draw():
            state = self._do(trial, begin, listener, stop, evaluates_dense=False)
            search.tell(trial, state.value)
            yield state

    @property
    def _methods(self) -> tuple[str, ...]:
        """Methods that the sweep compares. A setting that one of them ignores gives no notice."""
        named = self.spec.grid.get("method", ())
        return tuple(dict.fromkeys((*named, *(str(p["method"]) for p in self.spec.points if "method" in p))))

    def _search(self) -> Search:
        from pipeline.sweeps.search import Search

        if self.spec.database is None and is_address(self.place):
            raise ConfigError(f"--search in {self.place} needs --storage URL: a database cannot be in a bucket")
        default = f"sqlite:///{self.place_of('search.db')}"
        return Search(self.spec, self.spec.database or default)

    def _do(
        self, trial: Trial, begin: Begin, listener: Listener, stop: StopRequest, *, evaluates_dense: bool
    ) -> TrialState:
        before = self._state(trial)
        if before.state == "done":
            return before
        key = f"failures/{trial.name}.json"
        try:
            gathered = settings_at(self.spec.gathered, trial.point)
            if not evaluates_dense:
                # The first trial evaluates the dense model for all.
                gathered = replace(gathered, values=gathered.values.changed(evaluate_dense=False))
            prepared = prepare(gathered, self._methods)
            shared = self._shared(gathered, prepared, begin, listener, stop)
            run, config = start(prepared, self.place_of("trials", trial.name))
            for notice in prepared.notices:
                listener.warn(notice)
            begin(run, config)
            resume(run, config, listener, stop, ResumeOptions(shared_with=shared))
        except (Preempted, Interrupted, Occupied):
            raise
        except (PipelineError, StageError) as error:
            listener.warn(f"trial {trial.name} failed: {error}")
            record = {"error": str(error), "at": datetime.now(UTC).isoformat()}
            self.storage.replace(key, (json.dumps(record, indent=2) + "\n").encode())
            return self._state(trial)
        self.storage.remove(key)
        return self._state(trial)

    def _shared(
        self, gathered: Gathered, prepared: Prepared, begin: Begin, listener: Listener, stop: StopRequest
    ) -> RunDirectory | None:
        """A run with the calibrate and capture steps of this trial; None for a method without calibration data."""
        if prepared.config.calibration is None:
            return None
        values = {field: getattr(gathered.values, field) for field in _SHARED_FIELDS}
        plain = type(gathered.values)(**values, sparsity=0.5, method="lamp", evaluate=())
        origins = {field: origin for field, origin in gathered.origins.items() if field in _SHARED_FIELDS}
        stem = prepare(Gathered(plain, origins, None))
        identity = [stem.config.identity, stem.model.model_dump(mode="json")]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        run, config = start(stem, self.place_of("shared", digest[:12]))
        if not any(commit.step == "capture" for commit in run.commits):
            begin(run, config, "calibration set and first activations for several trials")
            until_captured = ResumeOptions(until=lambda step: step.kind == "capture")
            resume(run, config, listener, stop, until_captured)
        return run


def _measures(config: RunConfig, gathered: Gathered) -> bool:
    """Whether a run measures what the user requested. A preset may name data of another kind of model."""
    asked = [field for field in _MEASURES if gathered.given(field)]
    return all(getattr(gathered.values, field) in (None, getattr(config, field)) for field in asked)
