"""Estimate the peak memory of each kind of step from a model's shapes, before anything is loaded.

An estimate is the sum of the tensors that the code holds at once and of the activations, counted layer by layer. A step
that exceeds the limit warns with its measured peak (`pipeline/steps/executor.py`).

P: parameters of a block.    C, R: input and output width of a layer.    T: tokens of a sample.    H: hidden size.
V: vocabulary.    All arithmetic is fp32, 4 bytes per number; bf16 takes no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.errors import ResourceError
from stages.models.base import BlockModel, LayerInfo
from stages.pruners.base import Pruner

_FP32 = 4
# Layers with these roles read the same input and share one set of statistics.
_SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
# Bytes that the export gathers before it writes (`stages.export`).
_EXPORTED_AT_ONCE = 256_000_000
# Allocators keep some freed memory, and small tensors are not counted.
_SLACK = 1.05
_NOISE = 1.15  # baseline memory differs between processes


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model and its calibration set that decide the memory of a run."""

    block: int  # P, of the largest block
    layers: tuple[LayerInfo, ...]  # of that block
    hidden: int  # H
    vocabulary: int  # V
    tokens: int  # T
    itemsize: int  # bytes of one number of a stored activation
    attention: int = 0  # numbers that a block's attention materializes for one sample

    @classmethod
    def of(cls, model: BlockModel, tokens: int, itemsize: int) -> Shapes:
        """The shapes of `model` with samples of `tokens` tokens."""
        sizes = [sum(model.entry_sizes(index).values()) for index in range(model.num_blocks)]
        largest = max(range(model.num_blocks), key=sizes.__getitem__)
        return cls(
            sizes[largest],
            model.layers(largest),
            model.hidden_size,
            model.vocab_size,
            tokens,
            itemsize,
            model.attention_numbers,
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


@dataclass(frozen=True)
class Fit:
    """The choices that keep a run within a memory limit, and its peak memory with them."""

    samples_at_once: int  # in a forward pass without gradients
    spills: bool  # the best weights so far are stored on disk while a block is trained
    peak_bytes: int


def peaks(shapes: Shapes, work: Work, samples: int, *, spills: bool) -> dict[str, int]:
    """Peak bytes of each kind of step, without the baseline memory of the process."""
    block, passing = _FP32 * shapes.block, shapes.passing(samples)
    ends = _FP32 * shapes.vocabulary * shapes.hidden
    found = {"capture": ends + block * work.trains + passing + shapes.chunks(3, samples)}
    found["prune-block"] = block + _pruning(shapes, work) + passing + shapes.chunks(2, samples)
    if work.trains:
        copies = 3 if spills else 4  # weights, two moments, the best so far
        # The straight-through estimator computes with a rounded copy of the weights and keeps it for the gradient.
        copies += work.is_quantized
        # The backward pass frees activations while it allocates gradients.
        low, high = sorted((block, shapes.remembered()))
        backward = max(high + low // 2, passing)
        masks = shapes.block
        found["training"] = copies * block + masks + backward + shapes.chunks(2, samples)
    found["export"] = ends + min(_EXPORTED_AT_ONCE, 2 * ends)
    if work.eval_tokens:
        logits = 3 * _FP32 * work.eval_tokens * shapes.vocabulary
        found["evaluate"] = max(2 * ends + logits, ends + passing, block + passing) + shapes.chunks(2, samples)
    return {kind: int(size * _SLACK) for kind, size in found.items()}


def _pruning(shapes: Shapes, work: Work) -> int:
    """Bytes of all statistics of a block and of solving its largest layer."""
    pruner, kind = work.pruner, work.pruner.statistics()
    sums = most = pooled = 0
    for group in shapes.inputs.values():
        cols, size = group[0].cols, max(layer.rows * layer.cols for layer in group)
        matrices = pruner.num_matrices(is_shared=len(group) > 1)
        numbers = _FP32 * kind.num_numbers(cols) if kind is not None else 0
        sums += numbers
        pooled = max(pooled, numbers) if group[0].peers is not None else pooled
        most = max(most, _FP32 * (matrices * cols**2 + pruner.num_weight_copies * size))
    return sums + max(most, pooled, 2 * shapes.block)  # the rounded block, 2 bytes per number, is made after solving


def fit(
    shapes: Shapes, work: Work, base_bytes: int, limit_bytes: int | None, candidates: Sequence[int], where: str
) -> Fit:
    """Choose the largest micro-batch that keeps the run within the memory limit.

    The best weights are spilled to disk only if no micro-batch fits otherwise.

    Args:
        shapes: Sizes of the model and its samples.
        work: What the run does.
        base_bytes: Baseline memory before the model is loaded.
        limit_bytes: The limit; None: no limit, the last candidate is chosen.
        candidates: Sizes of micro-batches, in samples, in rising order.
        where: "memory" or "GPU memory", for messages.

    Raises:
        ResourceError: Nothing fits; the message names the smallest sufficient limit.
    """
    options = [(samples, spills) for spills in (False, True) for samples in reversed(candidates)]
    for samples, spills in options:
        peak = base_bytes + max(peaks(shapes, work, samples, spills=spills).values())
        if limit_bytes is None or peak <= limit_bytes:
            return Fit(samples, spills, peak)
    smallest = int(_NOISE * base_bytes) + max(peaks(shapes, work, candidates[0], spills=True).values())
    details = peaks(shapes, work, candidates[0], spills=True)
    assert limit_bytes is not None
    raise ResourceError(
        f"--memory-limit {_gb(limit_bytes)} is too little: this run needs {_gb(_round_up(smallest))} of {where} "
        f"({_describe(details, base_bytes)}). Give it that much, or use a smaller --seqlen"
    )


def _describe(details: Mapping[str, int], base_bytes: int) -> str:
    parts = [f"{kind} {_gb(base_bytes + size)}" for kind, size in sorted(details.items(), key=lambda x: -x[1])]
    return ", ".join(parts)


def _round_up(size: int) -> int:
    step = 10_000_000
    return -(-size // step) * step


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}GB"
