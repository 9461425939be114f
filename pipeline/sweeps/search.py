"""A search for the best settings: Optuna samples points, the sweep runs them. Needs the extra `sweep`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.sweeps.spec import SweepSpec
from stages.metrics.registry import metric_of

if TYPE_CHECKING:
    from pipeline.sweeps.trial import Trial

_STUDY = "lampctl"
_ATTEMPTS = 4


class Search:
    """Trials of a search in a database. Every point is stored before its run begins."""

    def __init__(self, spec: SweepSpec, database: str) -> None:
        """database: an SQLAlchemy URL. Raises ConfigError if Optuna is missing or the database cannot be opened."""
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("--search needs Optuna: pip install '.[sweep]' in the clone of lampctl") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._spec = spec
        for attempt in range(_ATTEMPTS):
            try:
                self._study: Any = optuna.create_study(
                    storage=database, study_name=_STUDY, direction=self._direction, load_if_exists=True
                )
                break
            except Exception as error:
                if attempt < _ATTEMPTS - 1:  # two processes may create the study at once
                    time.sleep(0.5 * (attempt + 1))
                    continue
                raise ConfigError(
                    f"the search's database {database} cannot be used ({str(error).splitlines()[0]}); if it is "
                    "damaged, move it away: the search then starts again, and finished runs are kept"
                ) from error

    @property
    def _direction(self) -> Literal["minimize", "maximize"]:
        from stages.models.registry import family_of
        from stages.models.resolve import resolve
        from stages.tasks.registry import task_named

        values = self._spec.gathered.values
        folder = resolve(values.model, values.revision, trusts_code=values.trust_remote_code)
        metric = metric_of(task_named(family_of(folder).task).metric)
        return "maximize" if metric.higher_is_better else "minimize"

    def drawn(self) -> list[Trial]:
        """All trials so far, in order."""
        return [self._trial(found) for found in self._study.get_trials(deepcopy=False)]

    def draw(self) -> Trial | None:
        """Sample and store a new point; None once there are enough."""
        count = len(self._study.get_trials(deepcopy=False))
        assert self._spec.num_trials is not None
        if count >= self._spec.num_trials:
            return None
        # Seeded by the trial number: an interrupted search samples the same points as an uninterrupted one.
        self._study.sampler = self._optuna.samplers.TPESampler(seed=1000 * self._spec.gathered.values.seed + count)
        distributions = {
            found.field: self._optuna.distributions.FloatDistribution(found.low, found.high, log=found.is_log)
            for found in self._spec.search
        }
        return self._trial(self._study.ask(distributions))

    def tell(self, trial: Trial, value: float | None) -> None:
        """Store the result of a trial. None: it failed, or its metric overflowed."""
        state = self._optuna.trial.TrialState
        kept = self._study.get_trials(deepcopy=False)[trial.number]
        if kept.state.is_finished():
            return  # by an earlier call, or by another process
        try:
            if value is None:
                self._study.tell(trial.number, state=state.FAIL)
            else:
                self._study.tell(trial.number, value)
        except ValueError:
            if not self._study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                raise

    def _trial(self, found: Any) -> Trial:
        from pipeline.sweeps.trial import Trial

        return Trial(f"{found.number:04d}", {name: float(value) for name, value in found.params.items()}, found.number)
