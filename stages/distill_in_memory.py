"""Distill a model whose blocks `stages.lamp` has pruned, on streams in memory: the reference for every run.

`lampctl run` does the same with states on disk (`pipeline.steps.distill`), and gives bit-identical weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.distill import Distillation, Distiller, DistillSettings, GeneratedSamples, Teaching
from stages.generate_samples import generate_samples
from stages.in_memory import KeepingParts, ListScratch, ListStream
from stages.lamp import LampBlock
from stages.replay import replay
from stages.runtime.block_context import StageContext
from stages.training.distillation_work import PrunedBlocks


@dataclass(frozen=True)
class DistilledBlocks:
    """The report, and the blocks with the states after distillation."""

    distillation: Distillation
    blocks: tuple[LampBlock, ...]


def distill_in_memory(
    context: StageContext, blocks: Sequence[LampBlock], settings: DistillSettings, num_generated: int = 0
) -> DistilledBlocks:
    """Train all blocks of a pruned model together towards the original model's output.

    Args:
        context: The original model and the samples to distill on.
        blocks: Every block of the model, pruned, in order.
        settings: How to train.
        num_generated: Samples that the original model generates, to train on beside those of the context.

    Raises:
        UsageError: The model cannot generate text.
        NumericalError: The loss is not finite.
    """
    generated = None
    if num_generated:
        own = context.inputs[0]
        samples = ListStream(num_generated, tuple(own.shape), own.dtype)
        generate_samples(context, samples, settings.seed, holds_out=settings.holds_out, is_resident=True)
        generated = GeneratedSamples(samples, _teacher(replace(context, inputs=samples)))
    teaching = Teaching(_teacher(context), generated)
    pruned = PrunedBlocks(
        lambda i: blocks[i].finished.state,
        lambda i: {name: tensor.dtype for name, tensor in blocks[i].finished.state.items()},
        lambda i: blocks[i].outcome,
    )
    callbacks = KeepingParts(context.callbacks)
    distiller = Distiller(context, pruned, teaching, settings, ListScratch(), callbacks, is_resident=True)
    report = distiller.train()
    finished = []
    for block in blocks:
        finished.append(replace(block, finished=distiller.finish(block.index)))
    return DistilledBlocks(report, tuple(finished))


def _teacher(context: StageContext) -> ListStream:
    """The last block's output of the original model on the samples."""
    teacher = ListStream(len(context.inputs), context.hidden_shape, context.device.torch_dtype)
    replay(context, teacher, context.model.num_blocks, lambda index: None, ListScratch())
    return teacher
