"""Zero-shot accuracy as the field reports it: by lm-evaluation-harness, on an exported or original model folder.

Prompts, scoring and metrics are the harness's own; `stages.metrics.harness_tasks` only lets it read rows from this
machine. The whole model is in memory, in the dtype that it is stored in, as with the harness's own command line.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.errors import ResourceError, UsageError
from stages.metrics.harness_tasks import LAYOUT, MISSING_HARNESS, TaskData, render
from stages.models.loader import loader_of

if TYPE_CHECKING:
    from stages.interfaces import Watcher
    from stages.models.base import ModelFolder

# The seven that SparseGPT's and Wanda's followers, and LAMP, give the mean of.
TASKS = tuple(LAYOUT)


@dataclass(frozen=True)
class TaskResult:
    """What the harness found for one task, without examples in the prompt."""

    task: str
    metrics: Mapping[str, float]  # "acc", "acc_norm", each with "..._stderr" where the harness gives one
    num_rows: int
    num_rows_available: int
    task_version: str
    harness_version: str

    @property
    def is_partial(self) -> bool:
        """Whether only the first rows were used."""
        return self.num_rows < self.num_rows_available


def mean_of(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[float, int] | None:
    """The mean of a metric over the tasks that have it, each with the same weight, and how many those are."""
    values = [found[name] for found in metrics if name in found]
    return (fmean(values), len(values)) if values else None


def require_possible(metrics: Mapping[str, float | None]) -> None:
    """Raise ValueError for an accuracy outside of [0, 1], or a negative standard error. None: it is not known."""
    for name, value in metrics.items():
        kind = name.partition(",")[0]  # without how the harness filters answers
        if value is None:
            continue
        if kind.endswith("_stderr"):
            if value < 0:
                raise ValueError(f"{name} is {value}; a standard error is not negative")
        elif kind in ("acc", "acc_norm") and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1]")


def check_tasks(tasks: Sequence[str], data: TaskData | None) -> None:
    """Raise UsageError unless the harness is installed, knows every task, and `data` has its rows."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(MISSING_HARNESS)
    for task in tasks:
        if data is not None:
            data.rows(task)
    others = [task for task in tasks if task not in TASKS]
    if others:
        manager = _manager(None)
        known = {*manager.all_subtasks, *manager.all_groups}
        for task in others:
            if task in manager.all_tags:
                members = sorted(manager.task_index[task].tags)
                raise UsageError(f"--tasks {task}: that is several tasks, name them: {','.join(members)}")
            if task not in known:
                raise UsageError(
                    f"--tasks {task}: lm-evaluation-harness has no such task (lm_eval ls tasks lists them); the usual "
                    f"ones are {', '.join(TASKS)}"
                )


class ZeroShot:
    """A model that is loaded once and measured on one task after the other."""

    def __init__(self, folder: ModelFolder, device: str) -> None:
        """device: "cpu", "cuda:0". Raises UsageError where the harness is not installed."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(MISSING_HARNESS)
        with _quiet():
            self._model = _watched_model(loader_of(folder.path))(
                pretrained=str(folder.path),
                device=device,
                dtype="auto",
                batch_size=1,  # as the harness's command line has it: what is padded differs in the last bits
                trust_remote_code=folder.trusts_code,
            )

    def measure(self, task: str, data: TaskData | None, limit: int | None, callbacks: Watcher) -> TaskResult:
        """Accuracy on one task. data: where its rows lie; None: they come from the hub. limit: the most rows.

        Raises ResourceError where the hub is out of reach, UsageError for a task that the harness refuses.
        """
        from lm_eval import simple_evaluate

        self._model.callbacks = callbacks
        with _quiet():
            manager = _manager(data)
            _load(manager, task)
            found = simple_evaluate(
                model=self._model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,  # of metrics that are no mean; the error of an accuracy has a closed form
            )
        assert found is not None
        return _result(task, found)


def _load(manager: Any, task: str) -> None:
    """Have the harness read the rows of a task, which it fetches where it needs to."""
    from stages.machine.hub import UNREACHABLE, reason_of

    try:
        manager.load([task])
    except UNREACHABLE as error:
        raise ResourceError(
            f"the rows of {task} come from the Hugging Face hub, which is out of reach ({reason_of(error)}): try "
            "later, or use --task-data DIR with rows that lie on this machine (docs/evaluation.md has the layout)"
        ) from error
    except ValueError as error:
        raise UsageError(f"--tasks {task}: lm-evaluation-harness cannot use it ({reason_of(error)})") from error


def _manager(data: TaskData | None) -> Any:
    """What finds tasks for the harness: among its own (seconds), or among those whose rows lie here."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        if data is None:
            return TaskManager()
        return TaskManager(include_path=str(render(data)), include_defaults=False)


def _result(task: str, found: Mapping[str, Any]) -> TaskResult:
    """Of a group of tasks, its own metrics over the rows of all its tasks."""
    metrics: dict[str, float] = {}
    for key, value in found["results"][task].items():
        metric, comma, filtered_by = key.partition(",")
        # One row has no standard error: the harness says "N/A", or gives something that is no number.
        if comma and isinstance(value, int | float) and math.isfinite(value):
            # Where the harness filters answers in more than one way, the metric's name says which.
            metrics[metric if filtered_by == "none" else f"{metric}, {filtered_by}"] = float(value)
    rows = found["n-samples"].values()
    return TaskResult(
        task=task,
        metrics=metrics,
        num_rows=sum(each["effective"] for each in rows),
        num_rows_available=sum(each["original"] for each in rows),
        task_version=str(found["versions"].get(task, "")),
        harness_version=importlib.metadata.version("lm_eval"),
    )


def _watched_model(loader: str) -> type[Any]:
    """The harness's model for transformers, which tells our callbacks how far it is, and stops when they say so."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        """Between any two forward passes, the callbacks are asked."""

        AUTO_MODEL_CLASS = getattr(transformers, loader)
        callbacks: Watcher
        _done = _total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            self._done, self._total = 0, len(requests)
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self.callbacks.report(self._total, self._total, "answers")
            return found

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            self.callbacks.check_stop()
            logits = super()._model_call(inps, *args, **kwargs)
            # Answers of one token share a pass, so these are at least as many.
            self._done = min(self._done + len(inps), self._total)
            if self._total:
                self.callbacks.report(self._done, self._total, "answers")
            return logits

    return Watched


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness and what it uses from writing notices and progress bars to the terminal: we have our own."""
    import datasets
    from lm_eval import evaluator as harness
    from lm_eval.api import task as harness_task
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("lm_eval")
    level, bar, git_hash = logger.level, harness_task.tqdm, harness.get_git_commit_hash
    is_datasets_quiet = datasets.are_progress_bars_disabled()
    are_weights_shown = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    # This one alone cannot be turned off: "Building contexts" of lm_eval 0.4.
    harness_task.tqdm = functools.partial(bar, disable=True)
    # It asks git about the folder one happens to be in, and git complains where that is no repository.
    harness.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        logger.setLevel(level)
        harness_task.tqdm, harness.get_git_commit_hash = bar, git_hash
        if are_weights_shown:
            transformers_logging.enable_progress_bar()
        if not is_datasets_quiet:
            datasets.enable_progress_bars()
