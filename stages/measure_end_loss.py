"""The stage that measures how far an exported model's output is from the original model's, on held-out samples.

Both models are streamed, one block in memory at a time; hidden states lie in scratch streams. The loss of the output is
that of the task (`stages.training.end_loss`).

N: samples of the calibration set.    n: samples that are measured.    T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.interfaces import Samples, Scratch, Stream
from stages.metrics.block_passes import through_blocks
from stages.models.base import BlockModel, tokens_of
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import Counter
from stages.runtime.sample_views import ChosenSamples
from stages.tasks.registry import task_named
from stages.training.loss import split_samples


@dataclass(frozen=True)
class MeasuredEndLoss:
    """How far the exported model's output is from the original model's."""

    loss: str  # name of the end loss
    title: str  # of the end loss, for people
    value: float  # the mean over the samples; infinite or NaN where it overflowed
    num_samples: int  # n
    num_tokens: int  # n T
    samples_sha256: str  # of the samples: values on other samples do not compare


def measured_samples(num_samples: int) -> list[int]:
    """The samples of a calibration set that are measured: those that training holds out, whether or not it does.

    A set of one sample holds out none: its sample is measured.
    """
    return split_samples(num_samples, holds_out=True)[1] or list(range(num_samples))


def occurring(samples: Samples, numbers: Iterable[int], others: Samples, other_numbers: Iterable[int]) -> list[int]:
    """Those of the samples `numbers` that equal, bit for bit, one of the `other_numbers` of `others`."""
    known = {_digest(others[number]) for number in other_numbers}
    return [number for number in numbers if _digest(samples[number]) in known]


def measure_end_loss(
    context: StageContext, exported: BlockModel, scratch: Scratch, *, shares_ends: bool
) -> MeasuredEndLoss:
    """Measure the exported model on the held-out samples.

    Args:
        context: The original model and the N samples of the calibration set.
        exported: The model as it was exported: pruned and rounded.
        scratch: Space for the hidden states of n samples in both models.
        shares_ends: Embeddings, final norm and head of both models are equal; otherwise both heads are in memory.
    """
    return EndLossMeasuring(context, scratch).of(exported, shares_ends=shares_ends)


class EndLossMeasuring:
    """The measurement in two parts, for an original model that is overwritten by the pruned one between them."""

    @torch.no_grad()
    def __init__(self, context: StageContext, scratch: Scratch) -> None:
        """Run the original model. The arguments are those of `measure_end_loss`."""
        self._context, self._scratch = context, scratch
        self._inputs = ChosenSamples(context.inputs, measured_samples(len(context.inputs)))
        passes = 2 * (context.model.num_blocks + 1) + 1  # in and through each block, in both models; out
        self._counter = Counter(context.callbacks, len(self._inputs) * passes, "passes")
        self._dense = self._end_of(context.model, "dense")

    @torch.no_grad()
    def of(self, exported: BlockModel, *, shares_ends: bool) -> MeasuredEndLoss:
        """Run the exported model, and compare. The arguments are those of `measure_end_loss`."""
        original, device, callbacks = self._context.model, self._context.device.torch_device, self._context.callbacks
        found = self._end_of(exported, "exported")
        ends = exported.load_ends(device, part="leave")
        dense_ends = ends if shares_ends else original.load_ends(device, part="leave")
        end_loss, losses = task_named(original.task).end_loss, []
        for number in range(len(self._inputs)):
            callbacks.check_stop()
            sample, hidden, target = (part[number][None].to(device) for part in (self._inputs, found, self._dense))
            loss = end_loss.of(
                ends, sample, hidden, target, original.vocab_size, needs_gradient=False, dense_ends=dense_ends
            )
            losses.append(loss.value)
            self._counter.advance(loss=loss.value)
        return MeasuredEndLoss(
            end_loss.name,
            end_loss.title,
            math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf,
            len(self._inputs),
            len(self._inputs) * tokens_of(original, self._inputs),
            _sha256(self._inputs),
        )

    def _end_of(self, model: BlockModel, name: str) -> Stream:
        """The last block's output of every sample, (T, H)."""
        context, inputs = self._context, self._inputs
        stream = self._scratch.stream(name, len(inputs), context.hidden_shape, context.device.torch_dtype)
        boundary, advance = context.callbacks.check_stop, self._counter.advance
        through_blocks(model, (inputs, inputs), stream, context.device, boundary, advance)
        return stream


def _sha256(samples: Samples) -> str:
    """Digest of all these samples."""
    return hashlib.sha256(b"".join(_digest(samples[index]) for index in range(len(samples)))).hexdigest()


def _digest(sample: Tensor) -> bytes:
    """SHA-256 of a sample's shape and bytes."""
    data = sample.detach().cpu().contiguous()
    found = hashlib.sha256(repr((tuple(data.shape), str(data.dtype))).encode())
    found.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()
