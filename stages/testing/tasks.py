"""Conformance kit for tasks: `check_task` raises AssertionError with the requirement that a task fails."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from stages.data.base import DataSource
from stages.data.drawing import Drawing
from stages.errors import UsageError
from stages.in_memory import NullCallbacks
from stages.metrics.registry import METRICS
from stages.models.base import BlockModel
from stages.tasks.base import Task
from stages.tasks.registry import TASKS

_TOO_MANY = 10**9


def check_task(task: type[Task] | str, model: BlockModel, source: DataSource, foreign: DataSource) -> None:
    """Check a task with one of its models.

    Requirements: name, title, help and loading are complete; its metric measures it; samples have the number and
    shape asked for, are the same at every call, and are shifted by `skip`; a local source that is too small and a
    source of another task are refused; its end loss is 0 for the dense model's own output and above 0 for another.

    Args:
        task: The class, or its name in the registry.
        model: A small model of the task.
        source: A local data source of the task with at least four samples.
        foreign: A data source of another task.

    Raises:
        AssertionError: A requirement fails. The message names it.
    """
    if isinstance(task, str):
        assert TASKS.get(task).name == task, f"{task} has the name {TASKS.get(task).name}"
        task = TASKS.get(task)
    chosen = task()
    for attribute in ("name", "title", "help", "loader", "loader_dtype"):
        value = getattr(chosen, attribute, None)
        assert isinstance(value, str), f"{task.__name__}.{attribute} is missing"
        assert value, f"{task.__name__}.{attribute} is empty"
    assert any("PATH/TO/THIS/FOLDER" in line for line in chosen.loading), f"{task.__name__}.loading names no folder"
    assert METRICS.get(chosen.metric).task == chosen.name, f"{chosen.metric} does not measure {chosen.name} models"
    assert chosen.default_calibration or chosen.missing_calibration, f"{task.__name__}: no default, and no message"
    assert model.task == chosen.name, f"the kit needs a model of {chosen.name}"
    assert source.contents == chosen.contents, f"{task.__name__}.contents: the kit needs data of {chosen.contents}"
    tokens = model.fixed_tokens or 8
    for sampling in ("contiguous", "random"):
        _check_samples(chosen, model, source, Drawing(3, tokens, sampling, 0, 0))
    _check_end_loss(chosen, model, source, Drawing(1, tokens, "contiguous", 0, 0))
    many = Drawing(_TOO_MANY, tokens, "contiguous", 0, 0)
    assert _refuses(chosen, model, source, many), f"{source.name}: {_TOO_MANY} samples are not refused"
    assert _refuses(chosen, model, foreign, replace(many, num_samples=1)), f"{foreign.name} is not refused"


def _check_samples(task: Task, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
    where = f"{task.name}, {drawing}"
    task.require_samples(model, source, drawing)
    first, again = _samples(task, model, source, drawing), _samples(task, model, source, drawing)
    assert len(first) == drawing.num_samples, f"{where}: {len(first)} samples"
    assert torch.equal(first, again), f"{where}: other samples at the next call"
    shape = model.hidden_shape(tuple(first.shape[1:]))
    assert shape[-1] == model.hidden_size, f"{where}: the model does not take samples of {tuple(first.shape[1:])}"
    skipped = _samples(task, model, source, replace(drawing, num_samples=drawing.num_samples - 1, skip=1))
    assert torch.equal(skipped, first[1:]), f"{where}: skip does not leave out the first sample"


def _check_end_loss(task: Task, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
    loss = getattr(task, "end_loss", None)
    assert loss is not None, f"{task.name} has no end_loss"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", loss.name), f"{loss.name!r} is no name of an end loss"
    assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{1,200}", loss.title), f"{loss.name}: the title is no line of text"
    inputs = _samples(task, model, source, drawing)
    ends = model.load_ends(torch.device("cpu"), "all")
    with torch.no_grad():
        own = ends.enter(inputs).hidden.float()
    other = own + own.std() * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    values = {}
    for name, hidden in (("own", own), ("other", other)):
        found = loss.of(ends, inputs, hidden, own, model.vocab_size, needs_gradient=True, dense_ends=ends)
        values[name] = found.value
        assert found.gradient is not None, f"{loss.name} gives no gradient"
        assert found.gradient.shape == own.shape, f"{loss.name}: the gradient is not of the output's shape"
    assert abs(values["own"]) < 1e-5, f"{loss.name} is {values['own']} for the dense model's own output"
    assert values["other"] > abs(values["own"]), f"{loss.name} is {values['other']} for another output"


def _samples(task: Task, model: BlockModel, source: DataSource, drawing: Drawing) -> Tensor:
    drawn = task.draw(model, source, drawing, NullCallbacks())
    assert drawn.amount > 0, f"{task.name}: draws samples of no data"
    assert re.fullmatch("[a-z]{1,40}", drawn.unit), f"{task.name}: {drawn.unit!r} is no unit of data"
    return torch.stack([drawn.samples[index] for index in range(len(drawn.samples))])


def _refuses(task: Task, model: BlockModel, source: DataSource, drawing: Drawing) -> bool:
    try:
        task.require_samples(model, source, drawing)
    except UsageError:
        return True
    return False
