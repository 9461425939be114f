"""A pruned model, its samples and its teacher, for tests of distillation."""

from __future__ import annotations

from dataclasses import replace

import torch

from stages.distill import Distiller, DistillSettings, Teaching
from stages.export import block_dtypes
from stages.in_memory import KeepingParts, ListScratch, ListStream, NullCallbacks
from stages.lamp import LampSettings, lamp
from stages.machine.device import DeviceChoices
from stages.replay import replay
from stages.sparsity.nm_pattern import Pattern
from stages.training.distillation_work import PrunedBlocks
from stages.training.rates import Rate
from tests.blocks import budget_of, context_of, pruner_named

FP32 = DeviceChoices("cpu", "float32", 1, "highest", "here")
SETTINGS = DistillSettings(epochs=2, lr=Rate(2e-3), batch=3, holds_out=True, seed=0)
SEARCHING = replace(SETTINGS, lr=None)
N, T = 9, 12


def ids(model, num=N, tokens=T):
    stream = ListStream(num, (tokens,), torch.long)
    for i in range(num):
        stream.write(i, torch.randint(4, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(i)))
    return stream


def pixels(model, num=N):
    side = {"vision": 64}.get(model.task, 32)
    stream = ListStream(num, (3, side, side), torch.float32)
    for i in range(num):
        stream.write(i, torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)))
    return stream


class Case:
    """A pruned model, its samples and its teacher."""

    def __init__(self, model, goal=0.6, device=FP32, num_samples=N, **options) -> None:
        self.model, self.device, self.export_dtype = model, device, "original"
        self.inputs = ids(model, num_samples) if model.task == "language" else pixels(model, num_samples)
        context = context_of(model, self.inputs, device)
        pattern = goal if isinstance(goal, Pattern) else None
        settings = LampSettings(pruner_named("sparsegpt", pattern=pattern, **options))
        self.blocks = {b.index: b for b in lamp(context, budget_of(model, goal), settings)}
        self.teacher = ListStream(num_samples, context.hidden_shape, device.torch_dtype)
        replay(context, self.teacher, model.num_blocks, lambda index: None, ListScratch())

    @property
    def pruned(self):
        return PrunedBlocks(
            lambda i: self.blocks[i].finished.state,
            lambda i: block_dtypes(self.model, i, self.export_dtype),
            lambda i: self.blocks[i].outcome,
        )

    def distilled(self, callbacks=None, *, is_resident, settings=SETTINGS):
        """The report and the finished blocks."""
        callbacks = callbacks or KeepingParts(NullCallbacks())
        context = context_of(self.model, self.inputs, self.device, callbacks)
        distiller = Distiller(
            context, self.pruned, Teaching(self.teacher), settings, ListScratch(), callbacks, is_resident=is_resident
        )
        report = distiller.train()
        finished = [distiller.finish(i) for i in range(self.model.num_blocks)]
        return report, [block.state for block in finished]


def require_same(found, expected):
    assert found[0] == expected[0]
    for left, right in zip(found[1], expected[1], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
