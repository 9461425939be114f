"""Contexts, pruners and budgets for tests of stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.data.registry import parse_source
from stages.in_memory import ListScratch, NullCallbacks
from stages.interfaces import Callbacks, Samples, Stream
from stages.machine.device import DeviceChoices
from stages.metrics.base import EvaluationProtocol, MetricContext
from stages.metrics.perplexity import PerplexityScore, perplexity
from stages.metrics.streaming import window_values
from stages.models.base import BlockModel
from stages.pruners.base import PruneOptions, Pruner
from stages.pruners.registry import PRUNERS
from stages.runtime.block_context import BlockOutput, StageContext
from stages.sparsity.budget import BlockBudget, LayerShape, allocate, follow_pattern
from stages.sparsity.nm_pattern import Pattern

FP32 = DeviceChoices("cpu", "float32", torch.get_num_threads(), "highest", "here")


def context_of(
    model: BlockModel, inputs: Samples, device: DeviceChoices = FP32, callbacks: Callbacks | None = None
) -> StageContext:
    return StageContext(model, inputs, device, callbacks if callbacks is not None else NullCallbacks())


def pruner_named(name: str, **options: object) -> Pruner:
    return PRUNERS.get(name)(PruneOptions(**options))


def output_of(
    model: BlockModel, index: int, dtype: torch.dtype = torch.float32, stream: Stream | None = None
) -> BlockOutput:
    """The output of a block whose entries are all exported in one dtype."""
    return BlockOutput(dict.fromkeys(model.stored_names(index), dtype), stream)


def shapes_of(model: BlockModel) -> list[list[LayerShape]]:
    return [[LayerShape(x.name, x.role, x.rows, x.cols) for x in model.layers(i)] for i in range(model.num_blocks)]


def budget_of(model: BlockModel, goal: float | Pattern, alpha: float = 1.0, beta: float = 0.0) -> Sequence[BlockBudget]:
    shapes = shapes_of(model)
    return follow_pattern(shapes, goal) if isinstance(goal, Pattern) else allocate(shapes, goal, alpha, beta)


def perplexity_of(
    model: BlockModel, windows: Tensor, device: DeviceChoices = FP32, callbacks: Callbacks | None = None
) -> float:
    """Perplexity over windows of token ids (n, T), in memory."""
    source = parse_source("pydocs")
    protocol = EvaluationProtocol(windows.shape[1])
    told = callbacks if callbacks is not None else NullCallbacks()
    context = MetricContext(model, model, source, protocol, ListScratch(), device, told)
    return perplexity(window_values(context, windows, PerplexityScore()))
