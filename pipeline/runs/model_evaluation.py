"""Measure a model that belongs to no run: its metrics, one block in memory at a time, and zero-shot accuracy.

`lampctl evaluate MODEL` and `lampctl compare FOLDER` use it. Nothing is stored; evaluate steps of a run
(`pipeline.steps.evaluate`) measure in the same way (`stages.evaluate`) and commit the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.completion import usual_tasks
from pipeline.config.declarations import GivenSettings
from pipeline.config.settings import Settings
from pipeline.errors import ConfigError
from pipeline.rundir.records import JsonObject
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.storage.locate import is_address, locate
from pipeline.runs.prepare import RUNS
from stages.formats.file_digest import local_path
from stages.metrics.base import EvaluationProtocol
from stages.metrics.points import Points

if TYPE_CHECKING:
    from stages.data.base import DataSource
    from stages.data.chat import ChatTemplate
    from stages.data.text_source import Bos
    from stages.interfaces import Watcher
    from stages.machine.device import DeviceChoices
    from stages.metrics.base import Measurement
    from stages.metrics.harness_tasks import TaskData
    from stages.metrics.zero_shot import TaskResult
    from stages.models.base import BlockModel, ModelFolder

_USUAL_SEQLEN = 2048
# Shows the progress of one piece of work, given its name.
Showing = Callable[[str], AbstractContextManager["Watcher"]]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure of a model that belongs to no run, and how."""

    sources: tuple[str, ...] = ()  # names of data sources
    tasks: tuple[str, ...] = ()  # zero-shot tasks
    seqlen: int | None = None  # tokens of a window; None: 2048, or what the model can
    max_tokens: int | None = None
    points: Points | None = None
    max_images: int | None = None
    task_data: str | None = None
    task_limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    bos: Bos | Literal["auto"] = "auto"  # where BOS stands in windows of text
    chat_template: ChatTemplate = "auto"  # how conversations become text
    metrics: tuple[str, ...] = ()  # beside the usual one of the kind of model


@dataclass(frozen=True)
class ModelResults:
    """What was measured of such a model."""

    model: str
    source: str  # "hub", "folder", "pickle", "gguf", "wheel"
    revision: str | None
    device: str
    measured: tuple[Measurement, ...]
    accuracies: tuple[TaskResult, ...]
    task_files: str | None  # for the harness's own command line: its --include_path

    def record(self) -> JsonObject:
        """The same, ready for JSON, with what the results only work out when they are asked."""
        accuracies = [{**asdict(found), "is_partial": found.is_partial} for found in self.accuracies]
        return {**asdict(self), "measured": [found.record() for found in self.measured], "accuracies": accuracies}


def request_of(settings: GivenSettings) -> EvaluationRequest:
    """What was asked for on the command line; without data sources and tasks, perplexity on WikiText-2.

    Args:
        settings: Settings of an evaluation and of the device that were given, by name.

    Raises:
        ConfigError: A setting is wrong, or there is nothing to measure.
        UsageError: There is no such data source.
    """
    from stages.data.registry import parse_source

    found = Settings.of({**settings, "model": "any"})  # its checks, and its conversion of lists
    tasks = found.tasks if found.tasks is not None else usual_tasks(found.task_data, found.task_limit)
    usual = () if tasks else ("wikitext2",)
    parsed = [parse_source(name).name for name in (found.evaluate if found.evaluate is not None else usual)]
    if not parsed and not tasks:
        raise ConfigError("nothing to measure: name texts (--data wikitext2) or tasks (--tasks zero-shot)")
    return EvaluationRequest(
        sources=tuple(dict.fromkeys(parsed)),
        tasks=tasks,
        seqlen=found.eval_seqlen,
        max_tokens=found.eval_max_tokens,
        points=found.eval_points,
        max_images=found.eval_max_images,
        task_data=found.task_data,
        task_limit=found.task_limit,
        device=found.device,
        dtype=found.dtype,
        bos=found.bos or "auto",
        chat_template=found.chat_template,
        metrics=found.metrics,
    )


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


def evaluate_model(folder: ModelFolder, request: EvaluationRequest, showing: Showing) -> ModelResults:
    """The figures of one model. All that is asked for is checked before anything is computed.

    Raises ConfigError, UsageError for what cannot be measured; ResourceError where the hub is out of reach.
    """
    from stages.machine import device
    from stages.metrics.harness_tasks import TaskData, render
    from stages.metrics.zero_shot import check_tasks
    from stages.models.registry import open_model

    data = TaskData.at(request.task_data) if request.task_data is not None else None
    check_tasks(request.tasks, data)
    choices = device.choose(request.device, request.dtype)
    device.apply(choices)
    measured: tuple[Measurement, ...] = ()
    if request.sources or request.tasks:
        model = open_model(folder)
        _require_fitting(model, request)
    if request.sources:
        seqlen = _seqlen(request, model)
        at_once = device.micro_batches(choices.torch_device, seqlen)[-1]
        choices = replace(choices, batch_tokens=at_once * seqlen)
        measured = _measured(model, request, seqlen, choices, showing)
        del model
    accuracies: tuple[TaskResult, ...] = ()
    if request.tasks:
        accuracies = _accuracies(folder, request, data, choices.device, showing)
    return ModelResults(
        model=folder.name,
        source=folder.source,
        revision=folder.revision,
        device=choices.device,
        measured=measured,
        accuracies=accuracies,
        task_files=str(render(data)) if data is not None and request.tasks else None,
    )


def _require_fitting(model: BlockModel, request: EvaluationRequest) -> None:
    """Raise ConfigError for what says nothing about a model of this kind."""
    from stages.tasks.registry import model_for, task_named

    if task_named(model.task).reads_text:
        return
    for flag, value in (("--tasks", request.tasks), ("--seqlen", request.seqlen), ("--max-tokens", request.max_tokens)):
        if value:
            raise ConfigError(f"{flag}: {model.source.name} is {model_for(model.task)}; that is about text")


def _seqlen(request: EvaluationRequest, model: BlockModel) -> int:
    if model.fixed_tokens is not None:
        return model.fixed_tokens
    most = model.max_positions
    seqlen = request.seqlen
    if seqlen is None:
        seqlen = _USUAL_SEQLEN if most is None else min(_USUAL_SEQLEN, most)
    if most is not None and seqlen > most:
        raise ConfigError(f"--seqlen {seqlen}: the model has {most} positions; use --seqlen {most} or less")
    if request.max_tokens is not None and request.max_tokens < seqlen:
        raise ConfigError(f"--max-tokens {request.max_tokens} is less than one window of {seqlen} tokens")
    return seqlen


def _measured(
    model: BlockModel, request: EvaluationRequest, seqlen: int, choices: DeviceChoices, showing: Showing
) -> tuple[Measurement, ...]:
    from pipeline.rundir.activation_store import ScratchStreams
    from stages.data.registry import parse_source
    from stages.evaluate import evaluate, require_measurable
    from stages.in_memory import WithoutCheckpoints
    from stages.metrics.base import MetricContext

    decided = "stream" if request.bos == "auto" else request.bos
    protocol = EvaluationProtocol(
        seqlen, request.max_tokens, request.points, request.max_images, decided, request.chat_template
    )
    sources = [parse_source(name) for name in request.sources]
    asked = [(source, metric) for source in sources for metric in (None, *request.metrics)]
    for source, metric in asked:
        require_measurable(model, source, protocol, metric)
    protocol = _with_bos(model, sources[0], protocol, request.bos, choices, showing)
    found = []
    for source, metric in asked:
        with (
            tempfile.TemporaryDirectory(prefix="lampctl-") as place,
            showing(f"measuring on {source.name.partition(':')[0]}") as watcher,
        ):
            scratch, callbacks = ScratchStreams(Path(place)), WithoutCheckpoints(watcher)
            context = MetricContext(model, model, source, protocol, scratch, choices, callbacks)
            found.append(evaluate(context, metric))
    return tuple(found)


def _with_bos(
    model: BlockModel,
    source: DataSource,
    protocol: EvaluationProtocol,
    bos: str,
    choices: DeviceChoices,
    showing: Showing,
) -> EvaluationProtocol:
    """The protocol with BOS where it was asked for, or, by "auto", where the model itself has it best."""
    from pipeline.rundir.activation_store import ScratchStreams
    from stages.choose_bos import choose_bos
    from stages.data.tokenization import load_tokenizer
    from stages.in_memory import WithoutCheckpoints
    from stages.metrics.base import MetricContext
    from stages.tasks.registry import task_named

    if bos != "auto" or not task_named(model.task).reads_text:
        return protocol
    tokenizer = load_tokenizer(model.source.path, trusts_code=model.source.trusts_code)
    with tempfile.TemporaryDirectory(prefix="lampctl-") as place, showing("choosing where BOS stands") as watcher:
        scratch, callbacks = ScratchStreams(Path(place)), WithoutCheckpoints(watcher)
        context = MetricContext(model, model, source, protocol, scratch, choices, callbacks)
        choice = choose_bos(context, tokenizer, "evaluation")
        if choice.sentence is not None:
            watcher.warn(f"--bos auto: {choice.sentence}")
    return replace(protocol, bos=choice.mode)


def _accuracies(
    folder: ModelFolder, request: EvaluationRequest, data: TaskData | None, device: str, showing: Showing
) -> tuple[TaskResult, ...]:
    from stages.metrics.zero_shot import ZeroShot

    model, found = ZeroShot(folder, device), []
    for task in request.tasks:
        with showing(task) as watcher:
            found.append(model.measure(task, data, request.task_limit, watcher))
    return tuple(found)
