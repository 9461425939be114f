"""Estimate the peak memory of each kind of step from a model's shapes, before anything is loaded.

An estimate is the sum of the tensors that the code holds at once and of the activations, counted layer by layer. A step
that exceeds the limit warns with its measured peak (`pipeline/steps/executor.py`).

P: parameters of a block.    C, R: input and output width of a layer.    T: tokens of a sample.    H: hidden size.
V: vocabulary.    All arithmetic is fp32, 4 bytes per number; bf16 takes no more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stages.models.base import BlockModel, LayerInfo
from stages.pruners.base import Pruner
from stages.runtime.logit_slices import LOGITS_AT_ONCE

# Allocators keep some freed memory, and small tensors are not counted.
SLACK = 1.05
_FP32 = 4
# Layers with these roles read the same input and share one set of statistics.
_SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
# Bytes that the export gathers before it writes (`stages.export`).
_EXPORTED_AT_ONCE = 256_000_000


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model and its calibration set that decide the memory of a run."""

    block: int  # P, of the block; of a model, of the largest one
    layers: tuple[LayerInfo, ...]  # of that block
    hidden: int  # H
    vocabulary: int  # V
    tokens: int  # T
    itemsize: int  # bytes of one number of a stored activation
    attention: int = 0  # numbers that a block's attention materializes for one sample
    all_blocks: int = 0  # parameters of all blocks
    num_blocks: int = 0
    outside: int = 0  # numbers outside the blocks: embeddings, final norm, head

    @classmethod
    def of(cls, model: BlockModel, tokens: int, itemsize: int, block_index: int | None = None) -> Shapes:
        """The shapes of `model` with samples of `tokens` tokens. block_index: the block; None: the largest one."""
        sizes = [sum(model.entry_sizes(index).values()) for index in range(model.num_blocks)]
        chosen = range(model.num_blocks) if block_index is None else (block_index,)
        size, index = max((sizes[index], -index) for index in chosen)
        return cls(
            size,
            model.layers(-index),
            model.hidden_size,
            model.vocab_size,
            tokens,
            itemsize,
            model.attention_numbers,
            sum(sizes),
            model.num_blocks,
            model.outside_numbers,
        )

    @property
    def inputs(self) -> dict[str, list[LayerInfo]]:
        """The layers, grouped by the input that they read."""
        groups: dict[str, list[LayerInfo]] = {}
        for layer in self.layers:
            shared = _SHARED.get(layer.role or "", layer.path)
            expert = f"{layer.path.rpartition('.')[0]}." if layer.peers is not None else ""
            groups.setdefault(expert + shared, []).append(layer)
        return groups

    @property
    def loss(self) -> int:
        """Bytes of the logits of the student and the teacher, and of the loss between them."""
        return 6 * _FP32 * self.logits(self.tokens)

    def logits(self, tokens: int) -> int:
        """Most logits of a window of `tokens` tokens that are in memory at once."""
        return min(max(LOGITS_AT_ONCE, self.vocabulary), tokens * self.vocabulary)

    def chunks(self, num_streams: int, samples: int) -> int:
        """Bytes of two micro-batches of `samples` samples of each of `num_streams` streams."""
        return 2 * num_streams * samples * self.tokens * self.hidden * self.itemsize

    def passing(self, samples: int) -> int:
        """Bytes of a forward pass without gradients: one layer's input and output, and the residual stream."""
        widest = max((layer.rows + layer.cols for layer in self.layers), default=0)
        # Gated and attention layers hold two outputs at once.
        return _FP32 * samples * (self.tokens * (2 * widest + 4 * self.hidden) + self.attention)

    def remembered(self) -> int:
        """Bytes of the activations that a forward pass over one sample keeps for its gradient."""
        distinct = sum(math.ceil(group[0].token_share * group[0].cols) for group in self.inputs.values())
        outputs = sum(math.ceil(layer.token_share * layer.rows) for layer in self.layers)
        linear = 2 * distinct + 2 * outputs + 6 * self.hidden
        return _FP32 * (self.tokens * linear + 2 * self.attention)


@dataclass(frozen=True)
class Work:
    """The parts of a run's configuration that decide its memory."""

    pruner: type[Pruner]
    trains: bool  # compensates or refines
    is_quantized: bool
    eval_tokens: int  # of one evaluation window; 0: nothing is evaluated
    distills: bool = False
    kept: float = 1.0  # share of the weights that are not masked
    num_heads: int = 0  # in memory at once while the end loss is measured; 0: it is not
    num_at_once: int = 0  # texts that the original model generates at once; 0: none
    cache_bytes: int = 0  # bytes of the keys and values of one of them
    takes_over: bool = False  # the pruned blocks of another run


def peaks(shapes: Shapes, work: Work, samples: int, *, spills: bool, room_bytes: int | None = None) -> dict[str, int]:
    """Peak bytes of each kind of step, without the baseline memory of the process.

    room_bytes: What the statistics of a block may take at once; None: one pass collects all of them.
    """
    block, passing = _FP32 * shapes.block, shapes.passing(samples)
    ends = _FP32 * shapes.vocabulary * shapes.hidden
    found = {}
    if not work.takes_over:
        found["capture"] = ends + block * work.trains + passing + shapes.chunks(3, samples)
        found["prune-block"] = block + _pruning(shapes, work, room_bytes) + passing + shapes.chunks(2, samples)
    if work.trains and not work.takes_over:
        copies = 3 if spills else 4  # weights, two moments, the best so far
        # The straight-through estimator computes with a rounded copy of the weights and keeps it for the gradient.
        copies += work.is_quantized
        # The backward pass frees activations while it allocates gradients.
        low, high = sorted((block, shapes.remembered()))
        backward = max(high + low // 2, passing)
        masks = shapes.block
        found["training"] = copies * block + masks + backward + shapes.chunks(2, samples)
    if work.distills:
        found["distill"] = distillation(shapes, work, is_resident=False)
    if work.num_at_once:
        found["generate"] = generation(shapes, work, is_resident=False)
    found["export"] = ends + min(_EXPORTED_AT_ONCE, 2 * ends)
    if work.eval_tokens:
        logits = 3 * _FP32 * shapes.logits(work.eval_tokens)
        found["evaluate"] = max(_FP32 * shapes.outside + logits, ends + passing, block + passing) + shapes.chunks(
            2, samples
        )
    if work.num_heads:
        head = work.num_heads * _FP32 * shapes.outside + shapes.loss
        found["end-loss"] = max(head, ends + passing, block + passing) + shapes.chunks(2, samples)
    return {kind: int(size * SLACK) for kind, size in found.items()}


def distillation(shapes: Shapes, work: Work, *, is_resident: bool) -> int:
    """Bytes of a distillation step. is_resident: all blocks are in memory; otherwise one."""
    num_blocks, weights = (shapes.num_blocks, shapes.all_blocks) if is_resident else (1, shapes.block)
    # Weights and gradients, two moments of the kept weights, two masks of one byte; a step of Adam copies the kept
    # weights of one block, and their gradients.
    lasting = _FP32 * int((2 + 2 * work.kept) * weights) + 2 * weights
    if work.is_quantized:
        lasting += _FP32 * weights  # the rounded copy that the straight-through estimator computes with
    backward = max(num_blocks * shapes.remembered(), _FP32 * int(2 * work.kept * shapes.block))
    head = _FP32 * shapes.outside + shapes.loss
    chunks = shapes.chunks(2, 1)
    return lasting + backward + head + chunks if is_resident else max(lasting + backward, head) + chunks


def generation(shapes: Shapes, work: Work, *, is_resident: bool) -> int:
    """Bytes of a step in which the original model generates samples. is_resident: all blocks are in memory, or one."""
    logits = 4 * _FP32 * work.num_at_once * shapes.vocabulary  # their softmax, and what is drawn from it
    weights = _FP32 * (shapes.all_blocks if is_resident else shapes.block)
    return _FP32 * shapes.outside + logits + weights + work.num_at_once * work.cache_bytes


def least_room(shapes: Shapes, work: Work) -> int:
    """Bytes that the statistics of a block take at once, if each pass collects those of one input."""
    places = Counter(group[0].peers for group in shapes.inputs.values())
    # An expert may need the sum of its peers, which is in memory between their passes.
    return max(
        (
            (2 if group[0].peers is not None and places[group[0].peers] > 1 else 1) * _sums(group, work)
            for group in shapes.inputs.values()
        ),
        default=0,
    )


def least_peaks(shapes: Shapes, work: Work, samples: int, *, spills: bool) -> dict[str, int]:
    """`peaks`, with as many passes over the samples as keep the peak of pruning low."""
    one_pass = peaks(shapes, work, samples, spills=spills)
    passes = peaks(shapes, work, samples, spills=spills, room_bytes=least_room(shapes, work))
    return min(one_pass, passes, key=lambda found: found.get("prune-block", 0))


def statistics_room(shapes: Shapes, work: Work, samples: int, left_bytes: int | None) -> int | None:
    """How many bytes the statistics of a block may take at once (`stages.runtime.statistics_passes`).

    Args:
        shapes: Of the block.
        work: What the run does.
        samples: In a forward pass.
        left_bytes: What the memory limit leaves beside the baseline memory; None: no limit.

    Returns:
        None: all of them fit.
    """
    if left_bytes is None or peaks(shapes, work, samples, spills=True).get("prune-block", 0) <= left_bytes:
        return None
    others = _FP32 * shapes.block + shapes.passing(samples) + shapes.chunks(2, samples)
    return max(0, int(left_bytes / SLACK) - others - _beside_statistics(shapes, work))


def _pruning(shapes: Shapes, work: Work, room_bytes: int | None) -> int:
    """Bytes of the statistics of a block, of its masks, and of solving a layer.

    room_bytes: What the statistics take at most; None: all of them are collected at once, and each is freed when its
        layers are pruned.
    """
    if room_bytes is not None:
        return room_bytes + _beside_statistics(shapes, work)
    groups = shapes.inputs.values()
    rest = sum(_sums(group, work) for group in groups)
    masked, most = 0, rest + _pooled(shapes, work)
    for group in groups:
        masked += sum(layer.rows * layer.cols for layer in group)
        most = max(most, rest + masked + _solving(group, work))
        rest -= _sums(group, work)
    return most


def _beside_statistics(shapes: Shapes, work: Work) -> int:
    """Bytes that pruning in several passes takes beside statistics: masks, a byte for each weight, and a layer."""
    return shapes.block + max([_pooled(shapes, work), *(_solving(group, work) for group in shapes.inputs.values())])


def _pooled(shapes: Shapes, work: Work) -> int:
    """Bytes of the sum of the statistics of all experts at a place."""
    return max((_sums(group, work) for group in shapes.inputs.values() if group[0].peers is not None), default=0)


def _sums(group: Sequence[LayerInfo], work: Work) -> int:
    """Bytes of the statistics of an input, which the layers of `group` read."""
    kind = work.pruner.statistics()
    return _FP32 * kind.num_numbers(group[0].cols) if kind is not None else 0


def _solving(group: Sequence[LayerInfo], work: Work) -> int:
    """Bytes of solving a layer of `group`, beside its statistics."""
    size = max(layer.rows * layer.cols for layer in group)
    matrices = work.pruner.num_matrices(is_shared=len(group) > 1)
    return _FP32 * (matrices * group[0].cols ** 2 + work.pruner.num_weight_copies * size)
