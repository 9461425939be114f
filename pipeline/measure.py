"""Measure a model that belongs to no run: perplexity, one block in memory at a time, and zero-shot accuracy.

Nothing is kept but the figures that come back; `pipeline.work` does the same for a run, in steps that are committed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import usual_tasks
from pipeline.errors import ConfigError
from pipeline.prepare import RUNS
from pipeline.rundir import RunDirectory
from pipeline.settings import split_tasks
from pipeline.storage.locate import locate
from pipeline.storage.objects import is_address
from stages.filedigest import local_path

if TYPE_CHECKING:
    from stages.evaluate import TextResult
    from stages.metrics.task_files import TaskData
    from stages.metrics.zeroshot import TaskResult
    from stages.models.base import BlockModel, ModelFolder
    from stages.protocols import Checkpoint, Watcher

_USUAL_SEQLEN = 2048
# Shows how far a piece of work is, which it is told the name of.
Showing = Callable[[str], AbstractContextManager["Watcher"]]


@dataclass(frozen=True)
class Wanted:
    """What is to be measured of a model, and how."""

    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    seqlen: int | None = None  # None: 2048, or what the model can
    max_tokens: int | None = None
    task_data: str | None = None
    task_limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class ModelFigures:
    """What was measured of a model."""

    model: str
    source: str  # "hub", "folder", "pickle", "gguf", "wheel"
    revision: str | None
    device: str
    perplexities: tuple[TextResult, ...]
    accuracies: tuple[TaskResult, ...]
    task_files: str | None  # for the harness's own command line: its --include_path

    def record(self) -> dict[str, Any]:
        """The same, ready for JSON, with what the results only work out when they are asked."""
        accuracies = [{**asdict(found), "is_partial": found.is_partial} for found in self.accuracies]
        return {**asdict(self), "accuracies": accuracies}


def wanted_of(
    *,
    sources: str | None,
    tasks: str | None,
    task_data: str | None,
    task_limit: int | None,
    seqlen: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
) -> Wanted:
    """What was asked for on the command line; where nothing was, perplexity on WikiText-2. Raises UsageError."""
    from stages.data.sources import parse_source

    named = split_tasks(tasks) if tasks is not None else usual_tasks(task_data, task_limit)
    if sources is None:
        sources = "" if named else "wikitext2"
    parsed = [parse_source(name.strip()).name for name in sources.split(",") if name.strip()]
    if not parsed and not named:
        raise ConfigError("nothing to measure: name texts (--data wikitext2) or tasks (--tasks zero-shot)")
    return Wanted(tuple(dict.fromkeys(parsed)), named, seqlen, max_tokens, task_data, task_limit, device, dtype)


def names_run(place: str) -> bool:
    """Whether `place` is a run rather than a model. Raises ConfigError for a folder that is neither."""
    folder = local_path(place)
    if is_address(place) or RunDirectory.is_at(locate(folder)):
        return True
    if folder.parts[:1] == RUNS.parts and not folder.exists():
        return True  # and `reopen` says that there is none
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ConfigError(f"{place} is neither a run (it has no run.json) nor a model (it has no config.json)")
    return False


def measure_model(folder: ModelFolder, wanted: Wanted, showing: Showing) -> ModelFigures:
    """The figures of one model. All that is asked for is checked before anything is computed.

    Raises ConfigError, UsageError for what cannot be measured; ResourceError where the hub is out of reach.
    """
    from stages import device
    from stages.metrics.task_files import TaskData, render
    from stages.metrics.zeroshot import check_tasks
    from stages.models.decoder import open_model

    data = TaskData.at(wanted.task_data) if wanted.task_data is not None else None
    check_tasks(wanted.tasks, data)
    choices = device.choose(wanted.device, wanted.dtype)
    device.apply(choices)
    perplexities: tuple[TextResult, ...] = ()
    if wanted.sources:
        model = open_model(folder)
        seqlen = _seqlen(wanted, model)
        at_once = device.micro_batches(choices.torch_device, seqlen)[-1]
        choices = replace(choices, batch_tokens=at_once * seqlen)
        perplexities = _perplexities(model, wanted, seqlen, choices, showing)
        del model
    accuracies: tuple[TaskResult, ...] = ()
    if wanted.tasks:
        accuracies = _accuracies(folder, wanted, data, choices.device, showing)
    return ModelFigures(
        model=folder.name,
        source=folder.source,
        revision=folder.revision,
        device=choices.device,
        perplexities=perplexities,
        accuracies=accuracies,
        task_files=str(render(data)) if data is not None and wanted.tasks else None,
    )


def _seqlen(wanted: Wanted, model: BlockModel) -> int:
    most = model.max_positions
    seqlen = wanted.seqlen
    if seqlen is None:
        seqlen = _USUAL_SEQLEN if most is None else min(_USUAL_SEQLEN, most)
    if most is not None and seqlen > most:
        raise ConfigError(f"--seqlen {seqlen}: the model has {most} positions; use --seqlen {most} or less")
    if wanted.max_tokens is not None and wanted.max_tokens < seqlen:
        raise ConfigError(f"--max-tokens {wanted.max_tokens} is less than one window of {seqlen} tokens")
    return seqlen


def _perplexities(
    model: BlockModel, wanted: Wanted, seqlen: int, choices: Any, showing: Showing
) -> tuple[TextResult, ...]:
    from pipeline.store import ScratchStreams
    from stages.data.sources import parse_source
    from stages.data.text import load_tokenizer
    from stages.evaluate import evaluate_text

    sources = [parse_source(name) for name in wanted.sources]
    for source in sources:
        source.check()
    tokenizer = load_tokenizer(model.source.path, trusts_code=model.source.trusts_code)
    found = []
    for source in sources:
        with (
            tempfile.TemporaryDirectory(prefix="lampctl-") as place,
            showing(f"perplexity on {source.kind}") as watcher,
        ):
            scratch, hooks = ScratchStreams(Path(place)), _Unkept(watcher)
            found.append(evaluate_text(model, source, tokenizer, seqlen, wanted.max_tokens, scratch, choices, hooks))
    return tuple(found)


def _accuracies(
    folder: ModelFolder, wanted: Wanted, data: TaskData | None, device: str, showing: Showing
) -> tuple[TaskResult, ...]:
    from stages.metrics.zeroshot import ZeroShot

    model, found = ZeroShot(folder, device), []
    for task in wanted.tasks:
        with showing(task) as watcher:
            found.append(model.measure(task, data, wanted.task_limit, watcher))
    return tuple(found)


class _Unkept:
    """`stages.protocols.Hooks` of work that keeps nothing: stopped, it begins at the beginning."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._watcher.report(done, total, unit, **figures)

    def check_stop(self) -> None:
        self._watcher.check_stop()

    def warn(self, message: str) -> None:
        self._watcher.warn(message)

    def restore(self) -> Checkpoint | None:
        return None

    def checkpoint(self, make: Callable[[], Checkpoint]) -> None:
        self._watcher.check_stop()
