"""Distill a model whose blocks `stages.lamp` has pruned, on streams in memory: the reference for every run.

`lampctl run` does the same with states on disk (`pipeline.steps.distill`), and gives bit-identical weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.distill import Distillation, Distiller, DistillSettings
from stages.generate_samples import generate_samples
from stages.in_memory import KeepingParts, ListScratch, ListStream
from stages.lamp import LampBlock
from stages.replay import replay
from stages.runtime.block_context import StageContext
from stages.runtime.joined import Joined
from stages.training.distillation_work import PrunedBlocks


@dataclass(frozen=True)
class DistilledBlocks:
    """The report, and the blocks with the states after distillation."""

    distillation: Distillation
    blocks: tuple[LampBlock, ...]


def distill_in_memory(context: StageContext, blocks: Sequence[LampBlock], settings: DistillSettings) -> DistilledBlocks:
    """Train all blocks of a pruned model together towards the original model's output.

    Args:
        context: The original model and the samples to distill on.
        blocks: Every block of the model, pruned, in order.
        settings: How to train. The original model writes `num_generated` samples beside those of the context.

    Raises:
        UsageError: The model cannot write text.
        NumericalError: The loss is not finite.
    """
    model = context.model
    if settings.num_generated:
        own = context.inputs[0]
        written = ListStream(settings.num_generated, tuple(own.shape), own.dtype)
        generate_samples(context, written, settings.seed, is_resident=True)
        context = replace(context, inputs=Joined((context.inputs, written)))
    teacher = ListStream(len(context.inputs), context.hidden_shape, context.device.torch_dtype)
    replay(context, teacher, model.num_blocks, lambda index: None, ListScratch())
    pruned = PrunedBlocks(lambda i: blocks[i].finished.state, lambda i: blocks[i].outcome)
    callbacks = KeepingParts(context.callbacks)
    distiller = Distiller(context, pruned, teacher, settings, ListScratch(), callbacks, is_resident=True)
    report = distiller.train()
    finished = []
    for block in blocks:
        dtypes = {name: tensor.dtype for name, tensor in block.finished.state.items()}
        finished.append(replace(block, finished=distiller.finish(block.index, dtypes)))
    return DistilledBlocks(report, tuple(finished))
